// Sixteen numbers at a time in the vector types of GCC and clang: the compiler makes of them what the
// instruction set of the file has. Everything is in an unnamed namespace, so that no copy that was compiled
// for one instruction set can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

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

template <class To, class From>
INLINE To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
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
    return __builtin_convertvector(rounded, Halves);
}

INLINE Halves to_float16(Floats f) {
    Words w = bits_of<Words>(f), a = w & 0x7fffffff;
    Words normal = ((a + 0x0fff + ((a >> 13) & 1)) >> 13) - (112 << 10);
    Words small = bits_of<Words>(bits_of<Floats>(a) + 0.5f) - 0x3f000000;  // the sum's last bit is 2^-24
    Words big = a > 0x7f800000 ? Words{} + 0x7e00 : Words{} + 0x7c00;
    Words h = a < 0x38800000 ? small : normal;
    h = a >= 0x47800000 ? big : h;
    return __builtin_convertvector(h | ((w >> 16) & 0x8000), Halves);
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

}  // namespace
}  // namespace attar
