// AVX2. Its product of bytes (vpmaddubsw) adds two products in 16 bits, where they saturate. Codes of few bits are far from
// that: several steps are summed up in 16 bits, then widened. Others are widened first, even and odd ones apart, which
// needs no shuffle, and pairs of 16-bit products are summed without loss.
#include <immintrin.h>

#include "tile.h"

namespace attar {
namespace {

struct Avx2 {
    typedef __m256i Vector;
    struct Weights {
        __m256i even, odd;
    };
    typedef Weights Values;
    static constexpr int WIDTH = 8, VECTORS = 2, ROWS = 4;
    static INLINE Vector zero() { return _mm256_setzero_si256(); }
    static INLINE Weights load_weights(const uint8_t* p) {
        __m256i w = _mm256_loadu_si256((const __m256i*)p);
        return {_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srli_epi16(w, 8)};
    }
    static INLINE Values broadcast(const int8_t* p) {
        int32_t even, odd;
        memcpy(&even, p, 4), memcpy(&odd, p + 4, 4);
        return {_mm256_set1_epi32(even), _mm256_set1_epi32(odd)};
    }
    // Once for all strips of the weight: of four bytes the even ones, then the odd ones.
    static void as_halves(const int8_t* x, int64_t depth, int8_t* to) {
        static_assert(ROWS == 4, "a register of a step");
        for (int64_t step = 0; step < depth; ++step, x += 16, to += 32) {
            const __m128i bytes = _mm_loadu_si128((const __m128i*)x);
            const __m128i even = _mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8), odd = _mm_srai_epi16(bytes, 8);
            _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi32(even, odd));
            _mm_storeu_si128((__m128i*)(to + 16), _mm_unpackhi_epi32(even, odd));
        }
    }
    static INLINE Vector dot(Vector sums, Weights w, Values x) {
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(w.even, x.even));
        return _mm256_add_epi32(sums, _mm256_madd_epi16(w.odd, x.odd));
    }
    // The same in 16 bits, and what becomes of it.
    static constexpr bool NARROW = true;
    static INLINE Vector narrow_dot(Vector sums, const uint8_t* weights, const int8_t* p) {
        int32_t word;
        memcpy(&word, p, 4);
        __m256i w = _mm256_loadu_si256((const __m256i*)weights);
        const __m256i products = _mm256_maddubs_epi16(w, _mm256_set1_epi32(word));
        // In place, and in this order: compilers compute all products first, for which there are no registers.
        asm volatile("vpaddw %1, %0, %0" : "+x"(sums) : "x"(products));
        return sums;
    }
    static INLINE Vector widen(Vector sums, Vector narrow) {
        return _mm256_add_epi32(sums, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
    }
    static INLINE Vector load_sums(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
    static INLINE void store_sums(int32_t* p, Vector v) { _mm256_storeu_si256((__m256i*)p, v); }
};

}  // namespace

const Kernels avx2_kernels = kernels_of<Avx2>("avx2");

}  // namespace attar
