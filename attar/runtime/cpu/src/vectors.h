// Sixteen numbers at a time in the vector types of GCC and clang: the compiler makes of them what the
// instruction set of the file has. Everything is in an unnamed namespace, so that no copy that was compiled
// for one instruction set can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define INLINE inline __attribute__((always_inline))

namespace attar {
namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Codes __attribute__((vector_size(16)));

// The numbers of one register: compilers keep wider vectors in memory where a loop has many of them.
#if defined(__AVX512F__)
constexpr int WIDE = 16;
#elif defined(__AVX2__)
constexpr int WIDE = 8;
#else
constexpr int WIDE = 4;
#endif
typedef float Wide __attribute__((vector_size(4 * WIDE)));
typedef int32_t WideInts __attribute__((vector_size(4 * WIDE)));

template <class V, class T>
INLINE V load(const T* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class V, class T>
INLINE void store(T* to, V v) {
    memcpy(to, &v, sizeof v);
}

// Unrolls a loop to its end, so that what it indexes are registers and not an array in memory.
#define UNROLL _Pragma("GCC unroll 32")

template <class To, class From>
INLINE To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// a · b + c, rounded once where the processor can: only for sums whose order is free anyway.
INLINE Wide multiply_add(Wide a, Wide b, Wide c) {
#if defined(__AVX512F__)
    return (Wide)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Wide)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// A number in every lane: it is exact to subtract zero, so that is no operation.
INLINE Wide everywhere(float v) { return v - Wide{}; }

#if defined(__AVX2__) && !defined(__AVX512F__)
INLINE __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// `count` numbers, at most WIDE; missing ones are zero.
INLINE Wide load_wide(const float* from, int64_t count) {
    if (count >= WIDE) return load<Wide>(from);
#if defined(__AVX512F__)
    return (Wide)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
#elif defined(__AVX2__)
    return (Wide)_mm256_maskload_ps(from, first_lanes(count));
#else
    Wide v = {};
    memcpy(&v, from, count * sizeof *from);
    return v;
#endif
}

INLINE void store_wide(float* to, int64_t count, Wide v) {
    if (count >= WIDE) return store(to, v);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), (__m512)v);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(to, first_lanes(count), (__m256)v);
#else
    memcpy(to, &v, count * sizeof *to);
#endif
}

// Every lane takes the number of the lane that differs from it in the bit STEP.
template <int STEP>
INLINE Floats swap_lanes(Floats v) {
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#if defined(__clang__)
    Floats swapped;
    for (int i = 0; i < LANES; ++i) swapped[i] = v[i ^ STEP];
    return (void)lane, swapped;
#else
    return __builtin_shuffle(v, lane ^ STEP);
#endif
}

// Conversions that compilers take apart into single numbers where they are not told the instruction.

// The low byte of each number.
INLINE Bytes low_bytes(Ints v) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
    __m256i h[2];
    memcpy(h, &v, 64);
    const __m256i mask = _mm256_set1_epi32(255);  // no packing instruction may see a number to saturate
    __m256i words = _mm256_packus_epi32(_mm256_and_si256(h[0], mask), _mm256_and_si256(h[1], mask));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    return (Bytes)_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
    return __builtin_convertvector(v, Bytes);
#endif
}

// The low half of each number, which is below 2^16.
INLINE Halves low_halves(Words v) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
    __m256i h[2];
    memcpy(h, &v, 64);
    return (Halves)_mm256_permute4x64_epi64(_mm256_packus_epi32(h[0], h[1]), 0xd8);
#else
    return __builtin_convertvector(v, Halves);
#endif
}

INLINE Ints widened(Codes codes) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu8_epi32((__m128i)codes);
#elif defined(__AVX2__)
    __m256i h[2] = {_mm256_cvtepu8_epi32((__m128i)codes), _mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)codes, 8))};
    return load<Ints>(h);
#else
    return __builtin_convertvector(codes, Ints);
#endif
}

INLINE Halves widened_halves(Codes codes) {
#if defined(__AVX2__)
    return (Halves)_mm256_cvtepu8_epi16((__m128i)codes);
#else
    return __builtin_convertvector(codes, Halves);
#endif
}

INLINE Floats from_bfloat16(Halves h) { return bits_of<Floats>(__builtin_convertvector(h, Words) << 16); }

INLINE Floats from_float16(Halves h) {
    Words w = __builtin_convertvector(h, Words);
    Words magnitude = (w & 0x7fff) << 13;
    Words value = bits_of<Words>(bits_of<Floats>(magnitude) * 0x1p112f);  // exact, subnormals included
    value = (w & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : value;      // infinity, NaN
    return bits_of<Floats>(value | (w & 0x8000) << 16);
}

// Both round to nearest, half to even.
INLINE Halves to_bfloat16(Floats f) {
    Words w = bits_of<Words>(f);
    Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    rounded = (w & 0x7fffffff) > 0x7f800000 ? Words{} + 0x7fc0 : rounded;
    return low_halves(rounded);
}

INLINE Halves to_float16(Floats f) {
    Words w = bits_of<Words>(f), a = w & 0x7fffffff;
    Words normal = ((a + 0x0fff + ((a >> 13) & 1)) >> 13) - (112 << 10);
    Words small = bits_of<Words>(bits_of<Floats>(a) + 0.5f) - 0x3f000000;  // the sum's last bit is 2^-24
    Words big = a > 0x7f800000 ? Words{} + 0x7e00 : Words{} + 0x7c00;
    Words h = a < 0x38800000 ? small : normal;
    h = a >= 0x47800000 ? big : h;
    return low_halves(h | ((w >> 16) & 0x8000));
}

INLINE Floats load_floats(const void* from, int64_t i, int32_t dtype) {
    if (dtype == FLOAT32) return load<Floats>(static_cast<const float*>(from) + i);
    Halves h = load<Halves>(static_cast<const uint16_t*>(from) + i);
    return dtype == BFLOAT16 ? from_bfloat16(h) : from_float16(h);
}

INLINE void store_floats(void* to, int64_t i, int32_t dtype, Floats f) {
    if (dtype == FLOAT32) {
        store(static_cast<float*>(to) + i, f);
    } else {
        store(static_cast<uint16_t*>(to) + i, dtype == BFLOAT16 ? to_bfloat16(f) : to_float16(f));
    }
}

INLINE int width(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

// The same where fewer than LANES numbers are left; the missing ones read as zero.
INLINE Floats load_some(const void* from, int64_t i, int32_t dtype, int64_t count) {
    if (count >= LANES) return load_floats(from, i, dtype);
    alignas(64) char buffer[64] = {};
    memcpy(buffer, static_cast<const char*>(from) + i * width(dtype), count * width(dtype));
    return load_floats(buffer, 0, dtype);
}

INLINE void store_some(void* to, int64_t i, int32_t dtype, int64_t count, Floats f) {
    if (count >= LANES) return store_floats(to, i, dtype, f);
    alignas(64) char buffer[64];
    store_floats(buffer, 0, dtype, f);
    memcpy(static_cast<char*>(to) + i * width(dtype), buffer, count * width(dtype));
}

// Swaps the off-diagonal halves of 2·STEP x 2·STEP blocks.
template <int STEP>
INLINE void exchange(Ints* rows) {
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Ints upper = (lane & STEP) == 0 ? lane : lane + (LANES - STEP);
    const Ints lower = (lane & STEP) == 0 ? lane + STEP : lane + LANES;
    UNROLL for (int i = 0; i < LANES; ++i) {
        if (i & STEP) continue;
        Ints a = rows[i], b = rows[i + STEP];
#if defined(__clang__)
        Ints high, low;
        for (int j = 0; j < LANES; ++j) {
            high[j] = upper[j] < LANES ? a[upper[j]] : b[upper[j] - LANES];
            low[j] = lower[j] < LANES ? a[lower[j]] : b[lower[j] - LANES];
        }
        rows[i] = high, rows[i + STEP] = low;
#else
        rows[i] = __builtin_shuffle(a, b, upper);
        rows[i + STEP] = __builtin_shuffle(a, b, lower);
#endif
    }
}

// A 16 x 16 matrix.
INLINE void transpose(Ints* rows) {
    exchange<8>(rows), exchange<4>(rows), exchange<2>(rows), exchange<1>(rows);
}

}  // namespace
}  // namespace attar
