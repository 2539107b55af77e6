// Packed codes of a weight: unpacked to bytes, to the layout of the dot product, or to floating point.
#pragma once

#if defined(__BMI2__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace attar {
namespace {

// Eight codes of `bits` bits in the low end of `word` -> eight bytes.
INLINE uint64_t spread(uint64_t word, int bits) {
    const uint64_t ones = 0x0101010101010101u;
#if defined(__BMI2__)
    return _pdep_u64(word, ones * ((1u << bits) - 1));
#else
    uint64_t bytes = 0;
    for (int i = 0; i < 8; ++i) bytes |= ((word >> (bits * i)) & ((1u << bits) - 1)) << (8 * i);
    return (void)ones, bytes;
#endif
}

// Codes [first, first + count) of a row -> bytes in `out`, which has room for count rounded up to eight.
// `first` is a multiple of eight. Little-endian, as the packed stream itself.
void expand(const Weight& w, int64_t row, int64_t first, int64_t count, uint8_t* out) {
    const uint8_t* stream = w.codes + row * w.row_bytes;
    if (w.bits == 8) {
        memcpy(out, stream + first, count);
        return;
    }
    int64_t i = 0, at = first / 8 * w.bits;
    if (w.bits == 4) {
        for (; i + 2 * LANES <= count; i += 2 * LANES, at += LANES) {
            Halves pairs = widened_halves(load<Codes>(stream + at));
            store(out + i, (pairs | pairs << 4) & 0x0f0f);
        }
    }
    for (; i < count; i += 8, at += w.bits) {
        uint64_t word = 0;
        int64_t left = w.row_bytes - at;
        if (left >= 8)
            memcpy(&word, stream + at, 8);
        else
            memcpy(&word, stream + at, left);
        word = spread(word, w.bits);
        memcpy(out + i, &word, 8);
    }
}

// STRIP outputs from `first` on -> ((k1 - k0) / 4, STRIP, 4) bytes.
template <int STRIP>
void unpack(const Weight& w, int64_t first, int64_t k0, int64_t k1, uint8_t* strip) {
    alignas(64) uint8_t bytes[LANES][64];
    for (int part = 0; part < STRIP; part += LANES) {
        for (int64_t k = k0; k < k1; k += 64) {
            int64_t count = w.k - k < 64 ? w.k - k : 64;
            Ints rows[LANES];
            for (int r = 0; r < LANES; ++r) {
                int64_t output = first + part + r;
                if (count < 64 || output >= w.n) memset(bytes[r], 0, 64);
                if (output < w.n) expand(w, output, k, count, bytes[r]);
            }
            for (int r = 0; r < LANES; ++r) rows[r] = load<Ints>(bytes[r]);  // when the stores have arrived
            transpose(rows);
            for (int r = 0; r < LANES; ++r) store(strip + ((k - k0) / 4 + r) * STRIP * 4 + part * 4, rows[r]);
        }
    }
}

// Row of the weight -> codes · scale, computed in float32 and rounded to `dtype`.
void dequantize(const Weight& w, int64_t row, uint8_t* scratch, void* out, int32_t dtype) {
    expand(w, row, 0, w.k, scratch);
    const int64_t size = w.k / w.groups;
    for (int64_t group = 0; group < w.groups; ++group) {
        const float scale = w.scale[row * w.groups + group];
        for (int64_t i = group * size, end = i + size; i < end; i += LANES) {
            Ints codes = widened(load<Codes>(scratch + i)) - (1 << (w.bits - 1));
            store_some(out, i, dtype, end - i, floats_of(codes) * scale);
        }
    }
}

}  // namespace
}  // namespace attar
