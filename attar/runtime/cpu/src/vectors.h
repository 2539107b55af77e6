// Sixteen numbers at a time, in as many registers as they take, of the vector types of GCC and clang: the compiler makes of
// these what the instruction set of the file has. (Of a vector wider than a register it makes a place in memory, and of its
// comparisons and shuffles single numbers.) Everything is in an unnamed namespace, so that no copy that was compiled for one
// instruction set can be linked into another.
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

// The numbers of one register, and those of its lanes.
#if defined(__AVX512F__)
constexpr int WIDE = 16;
#define ATTAR_LANES {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#elif defined(__AVX2__)
constexpr int WIDE = 8;
#define ATTAR_LANES {0, 1, 2, 3, 4, 5, 6, 7}
#else
constexpr int WIDE = 4;
#define ATTAR_LANES {0, 1, 2, 3}
#endif
typedef float Wide __attribute__((vector_size(4 * WIDE)));
typedef int32_t WideInts __attribute__((vector_size(4 * WIDE)));
typedef uint32_t WideWords __attribute__((vector_size(4 * WIDE)));
const WideInts LANE = ATTAR_LANES;

// Unrolls a loop to its end, so that what it indexes are registers and not an array in memory.
#define UNROLL _Pragma("GCC unroll 32")

constexpr int LANES = 16, PARTS = LANES / WIDE;

template <class Part>
struct Lanes {
    typedef Part Register;
    Part part[PARTS];
    INLINE auto operator[](int i) const { return part[i / WIDE][i % WIDE]; }
};
typedef Lanes<Wide> Floats;
typedef Lanes<WideInts> Ints;
typedef Lanes<WideWords> Words;
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Codes __attribute__((vector_size(16)));

template <class Part>
struct NumberOf {
    typedef decltype(Part{}[0] + Part{}[0]) type;
};
template <class Part>
using Number = typename NumberOf<Part>::type;

// Number by number, of two vectors or of a vector and a number for all.
#define ATTAR_OPERATOR(op)                                                 \
    template <class Part>                                                  \
    INLINE Lanes<Part> operator op(Lanes<Part> a, const Lanes<Part>& b) {  \
        UNROLL for (int i = 0; i < PARTS; ++i) a.part[i] = a.part[i] op b.part[i]; \
        return a;                                                          \
    }                                                                      \
    template <class Part>                                                  \
    INLINE Lanes<Part> operator op(Lanes<Part> a, Number<Part> b) {        \
        UNROLL for (int i = 0; i < PARTS; ++i) a.part[i] = a.part[i] op b; \
        return a;                                                          \
    }                                                                      \
    template <class Part>                                                  \
    INLINE Lanes<Part> operator op(Number<Part> a, Lanes<Part> b) {        \
        UNROLL for (int i = 0; i < PARTS; ++i) b.part[i] = a op b.part[i]; \
        return b;                                                          \
    }
ATTAR_OPERATOR(+)
ATTAR_OPERATOR(-)
ATTAR_OPERATOR(*)
ATTAR_OPERATOR(/)
ATTAR_OPERATOR(&)
ATTAR_OPERATOR(|)
ATTAR_OPERATOR(^)
ATTAR_OPERATOR(<<)
ATTAR_OPERATOR(>>)
#undef ATTAR_OPERATOR

template <class Part>
INLINE Lanes<Part> operator-(Lanes<Part> a) {
    UNROLL for (int i = 0; i < PARTS; ++i) a.part[i] = -a.part[i];
    return a;
}

template <class V>
struct Load {
    static INLINE V from(const void* place) {
        V v;
        memcpy(&v, place, sizeof v);
        return v;
    }
};

template <class Part>  // register by register: a copy of the whole would go through memory
struct Load<Lanes<Part>> {
    static INLINE Lanes<Part> from(const void* place) {
        Lanes<Part> v;
        UNROLL for (int i = 0; i < PARTS; ++i)
            v.part[i] = Load<Part>::from(static_cast<const char*>(place) + i * sizeof(Part));
        return v;
    }
};

template <class V>
INLINE V load(const void* from) {
    return Load<V>::from(from);
}

template <class V>
INLINE void store(void* to, V v) {
    memcpy(to, &v, sizeof v);
}

template <class Part>
INLINE void store(void* to, const Lanes<Part>& v) {
    UNROLL for (int i = 0; i < PARTS; ++i) store(static_cast<char*>(to) + i * sizeof(Part), v.part[i]);
}

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

// The same bits in lanes of another type.
template <class To, class Part>
INLINE To bits_of(const Lanes<Part>& from) {
    To to;
    UNROLL for (int i = 0; i < PARTS; ++i) to.part[i] = (typename To::Register)from.part[i];
    return to;
}

INLINE Floats floats_of(const Ints& v) {
    Floats f;
    UNROLL for (int i = 0; i < PARTS; ++i) f.part[i] = __builtin_convertvector(v.part[i], Wide);
    return f;
}

INLINE Floats multiply_add(Floats a, const Floats& b, const Floats& c) {
    UNROLL for (int i = 0; i < PARTS; ++i) a.part[i] = multiply_add(a.part[i], b.part[i], c.part[i]);
    return a;
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

// All bits of the lanes where a > b, none where one is NaN.
template <class Part>
INLINE Ints greater(const Lanes<Part>& a, const Lanes<Part>& b) {
    Ints mask;
    UNROLL for (int i = 0; i < PARTS; ++i) mask.part[i] = a.part[i] > b.part[i];
    return mask;
}

template <class Part>
INLINE Lanes<Part> chosen(const Ints& mask, Lanes<Part> yes, const Lanes<Part>& no) {
    UNROLL for (int i = 0; i < PARTS; ++i) yes.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
    return yes;
}

// The first `count` lanes.
INLINE Ints lanes_below(int64_t count) {
    Ints mask;
    UNROLL for (int i = 0; i < PARTS; ++i) mask.part[i] = LANE < int32_t(count) - i * WIDE;
    return mask;
}

// b where one of them is NaN.
template <class Part>
INLINE Lanes<Part> larger(Lanes<Part> a, const Lanes<Part>& b) {
    UNROLL for (int i = 0; i < PARTS; ++i) a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
    return a;
}

template <class Part>
INLINE Lanes<Part> smaller(Lanes<Part> a, const Lanes<Part>& b) {
    UNROLL for (int i = 0; i < PARTS; ++i) a.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
    return a;
}

// The lanes of two registers one after another, in the order of `lanes`.
INLINE WideInts shuffled(WideInts a, WideInts b, WideInts lanes) {
#if defined(__clang__)
    WideInts v;
    for (int i = 0; i < WIDE; ++i) v[i] = lanes[i] < WIDE ? a[lanes[i]] : b[lanes[i] - WIDE];
    return v;
#else
    return __builtin_shuffle(a, b, lanes);
#endif
}

// Every lane takes the number of the lane that differs from it in the bit STEP.
template <int STEP>
INLINE Wide swap_lanes(Wide v) {
    const WideInts numbers = bits_of<WideInts>(v);
    return bits_of<Wide>(shuffled(numbers, numbers, LANE ^ STEP));
}

// Conversions that compilers take apart into single numbers where they are not told the instruction.

// The low byte of each number.
INLINE Bytes low_bytes(Ints v) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)v.part[0]);
#elif defined(__AVX2__)
    v = v & 255;  // no packing instruction may see a number to saturate
    __m256i words = _mm256_packus_epi32((__m256i)v.part[0], (__m256i)v.part[1]);
    words = _mm256_permute4x64_epi64(words, 0xd8);
    return (Bytes)_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
    Bytes bytes;
    for (int i = 0; i < LANES; ++i) bytes[i] = int8_t(v[i]);
    return bytes;
#endif
}

// The low half of each number, which is below 2^16.
INLINE Halves low_halves(Words v) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)v.part[0]);
#elif defined(__AVX2__)
    return (Halves)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v.part[0], (__m256i)v.part[1]), 0xd8);
#else
    Halves halves;
    for (int i = 0; i < LANES; ++i) halves[i] = uint16_t(v[i]);
    return halves;
#endif
}

INLINE Ints widened(Codes codes) {
#if defined(__AVX512F__)
    return {{(WideInts)_mm512_cvtepu8_epi32((__m128i)codes)}};
#elif defined(__AVX2__)
    return {{(WideInts)_mm256_cvtepu8_epi32((__m128i)codes),
             (WideInts)_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)codes, 8))}};
#else
    Ints v;
    for (int i = 0; i < LANES; ++i) v.part[i / WIDE][i % WIDE] = codes[i];
    return v;
#endif
}

INLINE Words widened(Halves halves) {
#if defined(__AVX512F__)
    return {{(WideWords)_mm512_cvtepu16_epi32((__m256i)halves)}};
#elif defined(__AVX2__)
    return {{(WideWords)_mm256_cvtepu16_epi32(_mm256_castsi256_si128((__m256i)halves)),
             (WideWords)_mm256_cvtepu16_epi32(_mm256_extracti128_si256((__m256i)halves, 1))}};
#else
    Words v;
    for (int i = 0; i < LANES; ++i) v.part[i / WIDE][i % WIDE] = halves[i];
    return v;
#endif
}

INLINE Halves widened_halves(Codes codes) {
#if defined(__AVX2__)
    return (Halves)_mm256_cvtepu8_epi16((__m128i)codes);
#else
    return __builtin_convertvector(codes, Halves);
#endif
}

INLINE Floats from_bfloat16(Halves h) { return bits_of<Floats>(widened(h) << 16); }

INLINE Floats from_float16(Halves h) {
    Words w = widened(h);
    Words magnitude = (w & 0x7fff) << 13;
    Words value = bits_of<Words>(bits_of<Floats>(magnitude) * 0x1p112f);  // exact, subnormals included
    value = chosen(greater(bits_of<Ints>(w & 0x7c00), Ints{} + 0x7bff), magnitude | 0x7f800000, value);  // infinity, NaN
    return bits_of<Floats>(value | (w & 0x8000) << 16);
}

// Both round to nearest, half to even.
INLINE Halves to_bfloat16(Floats f) {
    Words w = bits_of<Words>(f);
    Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    rounded = chosen(greater(bits_of<Ints>(w & 0x7fffffff), Ints{} + 0x7f800000), Words{} + 0x7fc0, rounded);
    return low_halves(rounded);
}

INLINE Halves to_float16(Floats f) {
    Words w = bits_of<Words>(f), a = w & 0x7fffffff;
    Words normal = ((a + 0x0fff + ((a >> 13) & 1)) >> 13) - (112 << 10);
    Words small = bits_of<Words>(bits_of<Floats>(a) + 0.5f) - 0x3f000000;  // the sum's last bit is 2^-24
    const Ints size = bits_of<Ints>(a);
    Words big = chosen(greater(size, Ints{} + 0x7f800000), Words{} + 0x7e00, Words{} + 0x7c00);
    Words h = chosen(greater(Ints{} + 0x38800000, size), small, normal);
    h = chosen(greater(size, Ints{} + 0x477fffff), big, h);
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
INLINE void exchange(WideInts (*rows)[PARTS]) {
    const WideInts upper = (LANE & STEP) == 0 ? LANE : LANE + (WIDE - STEP);
    const WideInts lower = (LANE & STEP) == 0 ? LANE + STEP : LANE + WIDE;
    UNROLL for (int i = 0; i < LANES; ++i) {
        if (i & STEP) continue;
        UNROLL for (int p = 0; p < PARTS; ++p) {
            const int other = STEP < WIDE ? p : p + STEP / WIDE;
            if (other != p && (p & (STEP / WIDE))) continue;
            const WideInts a = rows[i][other], b = rows[i + STEP][p];
            rows[i][other] = STEP < WIDE ? shuffled(a, b, upper) : b;
            rows[i + STEP][p] = STEP < WIDE ? shuffled(a, b, lower) : a;
        }
    }
}

// A 16 x 16 matrix.
INLINE void transpose(Ints* rows) {
    WideInts parts[LANES][PARTS];
    UNROLL for (int i = 0; i < LANES; ++i)
        UNROLL for (int p = 0; p < PARTS; ++p) parts[i][p] = rows[i].part[p];
    exchange<8>(parts), exchange<4>(parts), exchange<2>(parts), exchange<1>(parts);
    UNROLL for (int i = 0; i < LANES; ++i)
        UNROLL for (int p = 0; p < PARTS; ++p) rows[i].part[p] = parts[i][p];
}

#if defined(__AVX2__)
// Four rows of LANES words, `stride` bytes apart, -> (LANES, 4): a fifth of the shuffles of a transposition.
INLINE void interleave(const int8_t* from, int64_t stride, int8_t* to) {
    UNROLL for (int half = 0; half < 2; ++half, from += 32) {
        __m256i row[4];
        UNROLL for (int r = 0; r < 4; ++r) row[r] = load<__m256i>(from + r * stride);
        const __m256i low = _mm256_unpacklo_epi32(row[0], row[1]), high = _mm256_unpackhi_epi32(row[0], row[1]);
        const __m256i low2 = _mm256_unpacklo_epi32(row[2], row[3]), high2 = _mm256_unpackhi_epi32(row[2], row[3]);
        // Words 0 and 4, 1 and 5, 2 and 6, 3 and 7.
        const __m256i a = _mm256_unpacklo_epi64(low, low2), b = _mm256_unpackhi_epi64(low, low2);
        const __m256i c = _mm256_unpacklo_epi64(high, high2), d = _mm256_unpackhi_epi64(high, high2);
        store(to, _mm256_permute2x128_si256(a, b, 0x20)), store(to + 32, _mm256_permute2x128_si256(c, d, 0x20));
        store(to + 64, _mm256_permute2x128_si256(a, b, 0x31)), store(to + 96, _mm256_permute2x128_si256(c, d, 0x31));
        to += 128;
    }
}
#endif

}  // namespace
}  // namespace attar
