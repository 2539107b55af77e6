// AVX-VNNI: the same instruction on half as many sums, for processors without AVX-512.
#include <immintrin.h>

#include "tile.h"

namespace attar {
namespace {

struct AvxVnni {
    typedef __m256i Vector, Weights, Values;
    static constexpr int WIDTH = 8, VECTORS = 2, ROWS = 6;
    static constexpr bool NARROW = false;
    static INLINE Vector zero() { return _mm256_setzero_si256(); }
    static INLINE Weights load_weights(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
    static INLINE Values broadcast(const int8_t* p) {
        int32_t word;
        memcpy(&word, p, 4);
        return _mm256_set1_epi32(word);
    }
    static INLINE Vector dot(Vector sums, Weights w, Values x) { return _mm256_dpbusd_avx_epi32(sums, w, x); }
    static INLINE Vector load_sums(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
    static INLINE void store_sums(int32_t* p, Vector v) { _mm256_storeu_si256((__m256i*)p, v); }
};

}  // namespace

const Kernels avxvnni_kernels = kernels_of<AvxVnni>("avx-vnni");

}  // namespace attar
