// AVX-512 with VNNI: one instruction adds four products of bytes to each of sixteen sums.
#include <immintrin.h>

#include "tile.h"

namespace attar {
namespace {

struct Avx512 {
    typedef __m512i Vector, Weights, Values;
    static constexpr int WIDTH = 16, VECTORS = 2, ROWS = 14;
    static constexpr bool NARROW = false;
    static INLINE Vector zero() { return _mm512_setzero_si512(); }
    static INLINE Weights load_weights(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static INLINE Values broadcast(const int8_t* p) {
        int32_t word;
        memcpy(&word, p, 4);
        return _mm512_set1_epi32(word);
    }
    static INLINE Vector dot(Vector sums, Weights w, Values x) { return _mm512_dpbusd_epi32(sums, w, x); }
    static INLINE Vector load_sums(const int32_t* p) { return _mm512_loadu_si512(p); }
    static INLINE void store_sums(int32_t* p, Vector v) { _mm512_storeu_si512(p, v); }
};

}  // namespace

const Kernels avx512_kernels = kernels_of<Avx512>("avx512-vnni");

}  // namespace attar
