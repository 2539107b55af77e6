// What kernels of attention with AVX-512 share: the order of keys and values, the softmax, the outputs.
#pragma once

#include <immintrin.h>

#include "attention.h"
#include "vectors.h"

namespace attar {
namespace {

constexpr double LOG2_E = 1.4426950408889634;  // exponents are of two, not of e

INLINE __mmask32 first_of(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// Up to STRIP_WIDTH features of a token; the missing ones are zero.
INLINE __m512i features(const uint16_t* token, int64_t from, int64_t width) {
    return _mm512_maskz_loadu_epi16(first_of(width - from), token + from);
}

const uint16_t* token_of(const uint16_t* base, const Places& places, const Attention& call, int64_t head, int64_t token) {
    return base + head / call.heads * places.batch + head % call.heads * places.head + token * places.token;
}

// COLUMNS: STRIP_WIDTH, or LANES.
template <int64_t KEY_BLOCK, int64_t COLUMNS>
void pack(const Attention& call, int64_t head, int64_t first, uint16_t* keys, uint16_t* values) {
    const int64_t count = least(KEY_BLOCK, call.keys - first);
    const int64_t padded = padded_width(call), used = round_up(count, STRIP_WIDTH);
    for (int64_t key = 0; key < used; key += LANES)
        for (int64_t d = 0; d < padded; d += STRIP_WIDTH) {
            Ints rows[LANES];
            for (int r = 0; r < LANES; ++r)
                rows[r] = key + r < count
                              ? Ints{{(WideInts)features(token_of(call.k, call.k_places, call, head, first + key + r), d, call.width)}}
                              : Ints{};
            transpose(rows);
            uint16_t* to = keys + key / COLUMNS * COLUMNS * padded + d * COLUMNS + key % COLUMNS * 2;
            for (int r = 0; r < LANES; ++r) store(to + r * 2 * COLUMNS, rows[r]);
        }
    alignas(64) uint16_t order[2][STRIP_WIDTH];
    for (int i = 0; i < STRIP_WIDTH; ++i) order[0][i] = i / 2 + i % 2 * 32, order[1][i] = order[0][i] + 16;
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    constexpr int64_t APART = COLUMNS == STRIP_WIDTH ? STRIP_WIDTH : LANES * KEY_BLOCK;
    for (int64_t key = 0; key < used; key += 2)
        for (int64_t d = 0; d < padded; d += STRIP_WIDTH) {
            __m512i even = _mm512_setzero_si512(), odd = even;
            if (key < count) even = features(token_of(call.v, call.v_places, call, head, first + key), d, call.width);
            if (key + 1 < count) odd = features(token_of(call.v, call.v_places, call, head, first + key + 1), d, call.width);
            uint16_t* to = values + d * KEY_BLOCK + key * COLUMNS;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(to + APART, _mm512_permutex2var_epi16(even, high, odd));
        }
}

// p · 2^(x rounded down) where 2^x is a normal number, zero where it is less, which would take long; NaN stays.
INLINE __m512 scaled(__m512 p, __m512 x) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p, x);
}

// 2^x to 3e-6 of its value.
INLINE __m512 exp2_of(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.0135341679f), f, _mm512_set1_ps(0.0520114606f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.241442757f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693003834f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000259f));
    return scaled(p, x);
}

// 2^x to 8e-5 of its value and half a unit of the last place of bfloat16 more: to be cut off, which rounds it.
INLINE __m512i weight_of(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.0780245227f), f, _mm512_set1_ps(0.226067155f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.695833541f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999925219f + 0x1p-8f));
    return (__m512i)scaled(p, x);
}

// 2^low, 2^high in bfloat16.
INLINE __m512i weights_of(__m512 low, __m512 high) {
    const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,  //
                                           31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(weight_of(low), upper, weight_of(high));
}

// `sum` and the weights, as rounded, so that these over their sum add up to one.
INLINE __m512 plus(__m512 sum, __m512i weights) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(0x3f803f80));
}

// Products of ROWS queries, at most LANES, with `count` keys (ROWS, stride), which times `factor` > 0 are exponents of
// two -> weights (ROWS, weight_stride), of which there are `used`, and which may begin where the products do; `kept`
// (LANES,) is what the outputs so far have to be multiplied by. `tops`, `totals` (LANES,): largest exponents, and sums of
// the exponentials, so far.
template <int ROWS>
void softmax(float* scores, int64_t stride, uint16_t* weights, int64_t weight_stride, float factor, int64_t count,
             int64_t used, float* tops, float* totals, float* kept) {
    alignas(64) float top[LANES] = {}, sum[LANES] = {};
    for (int r = 0; r < ROWS; ++r) {
        float* row = scores + r * stride;
        for (int64_t i = count; i < used; ++i) row[i] = -__builtin_inff();
        __m512 a = _mm512_loadu_ps(row), b = _mm512_loadu_ps(row + LANES);
        for (int64_t i = STRIP_WIDTH; i < used; i += STRIP_WIDTH) {
            a = _mm512_max_ps(a, _mm512_loadu_ps(row + i));
            b = _mm512_max_ps(b, _mm512_loadu_ps(row + i + LANES));
        }
        top[r] = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
    }
    const __m512 scale = _mm512_set1_ps(factor), before = _mm512_loadu_ps(tops);
    const __m512 now = _mm512_max_ps(_mm512_mul_ps(_mm512_load_ps(top), scale), before);
    const __m512 less = exp2_of(_mm512_sub_ps(before, now));
    _mm512_storeu_ps(tops, now), _mm512_storeu_ps(kept, less);
    for (int r = 0; r < ROWS; ++r) {
        const float* row = scores + r * stride;
        const __m512 most = _mm512_set1_ps(tops[r]);
        __m512 all = _mm512_setzero_ps();
        for (int64_t i = 0; i < used; i += STRIP_WIDTH) {
            const __m512 low = _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(row + i), scale), most);
            const __m512 high = _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(row + i + LANES), scale), most);
            const __m512i both = weights_of(low, high);
            all = plus(all, both);
            _mm512_storeu_si512(weights + r * weight_stride + i, both);
        }
        sum[r] = _mm512_reduce_add_ps(all);
    }
    _mm512_storeu_ps(totals, _mm512_fmadd_ps(_mm512_loadu_ps(totals), less, _mm512_load_ps(sum)));
}

// outputs (count, stride), divided by `totals` -> o.
void store_outputs(const Attention& call, int64_t head, int64_t first, int64_t count, const float* outputs, int64_t stride,
                   const float* totals) {
    const int64_t row = call.heads * call.width;
    for (int64_t r = 0; r < count; ++r) {
        const __m512 factor = _mm512_set1_ps(1.0f / totals[r]);
        uint16_t* to = call.o + (head / call.heads * call.queries + first + r) * row + head % call.heads * call.width;
        for (int64_t d = 0; d < call.width; d += STRIP_WIDTH) {
            const __m512 low = _mm512_loadu_ps(outputs + r * stride + d), high = _mm512_loadu_ps(outputs + r * stride + d + LANES);
            const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor));
            _mm512_mask_storeu_epi16(to + d, first_of(call.width - d), (__m512i)both);
        }
    }
}

}  // namespace
}  // namespace attar
