// Rows of activations: transforms, step size, integer codes, operation for operation those of reference.py.
#pragma once

#include "rotate.h"

namespace attar {
namespace {

// Integers in the order of the floats that they are the bits of; NaN lies beyond infinity.
INLINE Ints ordered(Ints bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

INLINE float from_ordered(int32_t i) { return bits_of<float>(i ^ ((i >> 31) & 0x7fffffff)); }

// Largest magnitude of a row; NaN if it holds one.
float absmax_of(const float* x, int64_t padded) {
    Ints top = {};
    for (int64_t i = 0; i < padded; i += LANES) {
        Ints magnitude = load<Ints>(x + i) & 0x7fffffff;
        top = magnitude > top ? magnitude : top;
    }
    int32_t most = 0;
    for (int i = 0; i < LANES; ++i) most = top[i] > most ? top[i] : most;
    return bits_of<float>(most);
}

void minmax_of(const float* x, int64_t padded, float* low, float* high) {
    Ints bottom = ordered(load<Ints>(x)), top = bottom;
    for (int64_t i = LANES; i < padded; i += LANES) {
        Ints v = ordered(load<Ints>(x + i));
        bottom = v < bottom ? v : bottom;
        top = v > top ? v : top;
    }
    int32_t least = bottom[0], most = top[0];
    for (int i = 1; i < LANES; ++i) {
        least = bottom[i] < least ? bottom[i] : least;
        most = top[i] > most ? top[i] : most;
    }
    *low = from_ordered(least), *high = from_ordered(most);
}

// One row -> codes, zeros up to `padded`; x and other are room for as many floats.
void quantize_row(const Linear& call, int64_t row, int64_t padded, float* x, float* other, int8_t* codes,
                  float* scale, int32_t* offset) {
    const int64_t k = call.weight.k;
    const float most = float((1 << (call.act_bits - 1)) - 1), least = -most - 1;
    const char* from = static_cast<const char*>(call.x) + row * k * width(call.x_dtype);
    int64_t whole = k - k % LANES;
    if (call.x_dtype == FLOAT32)
        memcpy(x, from, k * sizeof *x);
    else {
        for (int64_t i = 0; i < whole; i += LANES) store(x + i, load_floats(from, i, call.x_dtype));
        if (whole < k) store(x + whole, load_some(from, whole, call.x_dtype, k - whole));
    }
    transform(call, x, other);
    for (int64_t i = k; i < padded; ++i) x[i] = x[0];  // changes no minimum and no maximum

    float low = -__builtin_inff(), high = __builtin_inff(), absmax;
    if (call.clip) {
        minmax_of(x, padded, &low, &high);
        low *= call.clip[0], high *= call.clip[1];
        float below = __builtin_fabsf(low);
        absmax = below > high || below != below ? below : high;
    } else {
        absmax = absmax_of(x, padded);
    }
    const float step = (absmax < 1e-5f ? 1e-5f : absmax) / most;

    // Adding 1.5·2^23 rounds half to even and leaves the integer in the low bits; a NaN leaves zero there.
    const Floats lows = Floats{} + low, highs = Floats{} + high;
    const Floats leasts = Floats{} + least, mosts = Floats{} + most;
    for (int64_t i = 0; i < padded; i += LANES) {
        Floats v = load<Floats>(x + i);
        v = v < lows ? lows : v;
        v = v > highs ? highs : v;
        v = v / step;
        v = v < leasts ? leasts : v;
        v = v > mosts ? mosts : v;
        store(codes + i, __builtin_convertvector(bits_of<Ints>(v + 12582912.0f), Bytes));
    }
    memset(codes + k, 0, padded - k);
    int32_t sum = 0;
    for (int64_t i = 0; i < padded; ++i) sum += codes[i];
    *scale = step;
    *offset = -sum * (1 << (call.weight.bits - 1));
}

// `count` rows from `row` on -> the layout of Tile::x, in which ROWS rows lie interleaved: their values for one
// step of the product are neighbours, and the product reads a single stream.
template <int ROWS>
void quantize(const Linear& call, int64_t row, int64_t count, int64_t padded, void* scratch, int8_t* tile,
              float* scale, int32_t* offset) {
    static_assert(ROWS <= LANES, "a tile is transposed in one piece");
    float *x = static_cast<float*>(scratch), *other = x + padded;
    int8_t* codes = reinterpret_cast<int8_t*>(other + padded);
    for (int64_t r = 0; r < count; ++r)
        quantize_row(call, row + r, padded, x, other, codes + r * padded, scale + r, offset + r);
    for (int64_t k = 0; k < padded; k += 4 * LANES) {
        Ints rows[LANES] = {};
        for (int64_t r = 0; r < count; ++r) rows[r] = load<Ints>(codes + r * padded + k);
        transpose(rows);
        for (int step = 0; step < LANES; ++step) memcpy(tile + (k + 4 * step) * ROWS, &rows[step], ROWS * 4);
    }
}

}  // namespace
}  // namespace attar
