// Attention with AVX-512 and its dot product of bfloat16 pairs: products are summed in float32.
//
// A tile of queries meets a block of keys: scores, their exponentials, the weighted values. What the softmax is
// divided by, and the outputs so far, are corrected when a later block brings a larger score (FlashAttention), so no
// more than a tile of scores is ever in memory.
#include <immintrin.h>

#include "attention.h"
#include "vectors.h"

namespace attar {
namespace {

constexpr int ROWS = QUERY_TILE;

INLINE __m512bh pairs(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }

INLINE __m512bh pair_of(const uint16_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return (__m512bh)_mm512_set1_epi32(word);
}

INLINE __mmask32 first_of(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// Up to STRIP_WIDTH features of a token; the missing ones are zero.
INLINE __m512i features(const uint16_t* token, int64_t from, int64_t width) {
    return _mm512_maskz_loadu_epi16(first_of(width - from), token + from);
}

const uint16_t* token_of(const uint16_t* base, const Places& places, const Attention& call, int64_t head, int64_t token) {
    return base + head / call.heads * places.batch + head % call.heads * places.head + token * places.token;
}

void pack(const Attention& call, int64_t head, int64_t first, uint16_t* keys, uint16_t* values) {
    const int64_t count = least(KEY_BLOCK, call.keys - first);
    const int64_t padded = padded_width(call), used = round_up(count, STRIP_WIDTH);
    for (int64_t key = 0; key < used; key += LANES)
        for (int64_t d = 0; d < padded; d += STRIP_WIDTH) {
            Ints rows[LANES];
            for (int r = 0; r < LANES; ++r)
                rows[r] = key + r < count
                              ? (Ints)features(token_of(call.k, call.k_places, call, head, first + key + r), d, call.width)
                              : Ints{};
            transpose(rows);
            uint16_t* to = keys + key / STRIP_WIDTH * STRIP_WIDTH * padded + d * STRIP_WIDTH + key % STRIP_WIDTH * 2;
            for (int r = 0; r < LANES; ++r) store(to + r * 2 * STRIP_WIDTH, rows[r]);
        }
    alignas(64) uint16_t order[2][STRIP_WIDTH];
    for (int i = 0; i < STRIP_WIDTH; ++i) order[0][i] = i / 2 + i % 2 * 32, order[1][i] = order[0][i] + 16;
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int64_t key = 0; key < used; key += 2)
        for (int64_t d = 0; d < padded; d += STRIP_WIDTH) {
            __m512i even = _mm512_setzero_si512(), odd = even;
            if (key < count) even = features(token_of(call.v, call.v_places, call, head, first + key), d, call.width);
            if (key + 1 < count) odd = features(token_of(call.v, call.v_places, call, head, first + key + 1), d, call.width);
            uint16_t* to = values + d * KEY_BLOCK + key * STRIP_WIDTH;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(to + STRIP_WIDTH, _mm512_permutex2var_epi16(even, high, odd));
        }
}

// The state of a task; everything of a tile lies together.
struct Scratch {
    uint16_t* queries;  // (tiles, width / 2, ROWS, 2)
    float* outputs;     // (tiles, ROWS, padded width), not yet divided
    float* tops;        // (tiles, LANES) largest exponents so far
    float* totals;      // (tiles, LANES) sums of the exponentials so far
    float* scores;      // (ROWS, KEY_BLOCK), as exponents of two
    uint16_t* weights;  // (ROWS, KEY_BLOCK), their exponentials
};

Scratch scratch_of(const Attention& call, void* memory) {
    const int64_t elements = QUERY_BLOCK * padded_width(call), tiles = QUERY_BLOCK / ROWS;
    Scratch s;
    s.outputs = static_cast<float*>(memory);
    s.scores = s.outputs + elements;
    s.tops = s.scores + ROWS * KEY_BLOCK;
    s.totals = s.tops + tiles * LANES;
    s.weights = reinterpret_cast<uint16_t*>(s.totals + tiles * LANES);
    s.queries = s.weights + ROWS * KEY_BLOCK;
    return s;
}

int64_t scratch_bytes(const Attention& call) {
    return QUERY_BLOCK * padded_width(call) * 6 + ROWS * KEY_BLOCK * 6 + QUERY_BLOCK / ROWS * LANES * 8;
}

// ROWS queries against a strip of keys over `depth` pairs of features.
INLINE void score(const uint16_t* queries, const uint16_t* strip, int64_t depth, float factor, float* out) {
    __m512 sums[ROWS][2];
    UNROLL for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < depth; ++i, queries += 2 * ROWS, strip += 2 * STRIP_WIDTH) {
        const __m512bh a = pairs(strip), b = pairs(strip + STRIP_WIDTH);
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const __m512bh q = pair_of(queries + 2 * r);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], a, q);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], b, q);
        }
    }
    const __m512 scale = _mm512_set1_ps(factor);
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int v = 0; v < 2; ++v)
            _mm512_storeu_ps(out + r * KEY_BLOCK + v * LANES, _mm512_mul_ps(sums[r][v], scale));
}

// ROWS rows of `2 · depth` weights times a strip of the values, added to `kept` · what is there.
INLINE void weigh(const uint16_t* weights, const uint16_t* strip, int64_t depth, const float* kept, bool begin, float* out,
                  int64_t stride) {
    __m512 sums[ROWS][2];
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int v = 0; v < 2; ++v)
            sums[r][v] = begin ? _mm512_setzero_ps()
                               : _mm512_mul_ps(_mm512_loadu_ps(out + r * stride + v * LANES), _mm512_set1_ps(kept[r]));
    for (int64_t i = 0; i < depth; ++i, weights += 2, strip += 2 * STRIP_WIDTH) {
        const __m512bh a = pairs(strip), b = pairs(strip + STRIP_WIDTH);
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const __m512bh w = pair_of(weights + r * KEY_BLOCK);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], a, w);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], b, w);
        }
    }
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int v = 0; v < 2; ++v) _mm512_storeu_ps(out + r * stride + v * LANES, sums[r][v]);
}

// 2^x for x <= 0 to 3e-6 of its value, and zero below the smallest normal number; NaN stays.
INLINE __m512 exp2_of(__m512 x) {
    const __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.00957010191f), f, _mm512_set1_ps(0.0559178603f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240247448f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693121815f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999999261f));
    return _mm512_maskz_scalef_ps(kept, p, whole);
}

// Scores of a tile over `count` keys -> weights, of which there are `used`; `kept` (ROWS,) is what the outputs so far
// have to be multiplied by.
void softmax(float* scores, uint16_t* weights, int64_t count, int64_t used, float* tops, float* totals, float* kept) {
    alignas(64) float top[LANES] = {}, sum[LANES] = {};
    for (int r = 0; r < ROWS; ++r) {
        float* row = scores + r * KEY_BLOCK;
        for (int64_t i = count; i < used; ++i) row[i] = -__builtin_inff();
        __m512 a = _mm512_loadu_ps(row), b = _mm512_loadu_ps(row + LANES);
        for (int64_t i = STRIP_WIDTH; i < used; i += STRIP_WIDTH) {
            a = _mm512_max_ps(a, _mm512_loadu_ps(row + i));
            b = _mm512_max_ps(b, _mm512_loadu_ps(row + i + LANES));
        }
        top[r] = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
    }
    const __m512 before = _mm512_loadu_ps(tops), now = _mm512_max_ps(_mm512_load_ps(top), before);
    const __m512 factor = exp2_of(_mm512_sub_ps(before, now));
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    _mm512_storeu_ps(tops, now), _mm512_storeu_ps(kept, factor);
    for (int r = 0; r < ROWS; ++r) {
        const float* row = scores + r * KEY_BLOCK;
        const __m512 most = _mm512_set1_ps(tops[r]);
        __m512 all = _mm512_setzero_ps();
        for (int64_t i = 0; i < used; i += STRIP_WIDTH) {
            const __m512 low = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(row + i), most));
            const __m512 high = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(row + i + LANES), most));
            const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
            all = _mm512_dpbf16_ps(all, both, ones);  // of the rounded weights, so that they add up to one
            _mm512_storeu_si512(weights + r * KEY_BLOCK + i, (__m512i)both);
        }
        sum[r] = _mm512_reduce_add_ps(all);
    }
    _mm512_storeu_ps(totals, _mm512_fmadd_ps(_mm512_loadu_ps(totals), factor, _mm512_load_ps(sum)));
}

void load_queries(const Attention& call, int64_t head, int64_t first, int64_t count, uint16_t* to) {
    const int64_t depth = parts_of(call.width, 2);
    for (int64_t r = 0; r < ROWS; ++r)
        for (int64_t i = 0; i < depth; ++i) {
            uint16_t pair[2] = {0, 0};
            if (r < count)
                memcpy(pair, token_of(call.q, call.q_places, call, head, first + r) + 2 * i, 2 * i + 1 < call.width ? 4 : 2);
            memcpy(to + (i * ROWS + r) * 2, pair, 4);
        }
}

void store_outputs(const Attention& call, int64_t head, int64_t first, int64_t count, const float* outputs,
                   const float* totals) {
    const int64_t padded = padded_width(call), row = call.heads * call.width;
    for (int64_t r = 0; r < count; ++r) {
        const __m512 factor = _mm512_set1_ps(1.0f / totals[r]);
        uint16_t* to = call.o + (head / call.heads * call.queries + first + r) * row + head % call.heads * call.width;
        for (int64_t d = 0; d < call.width; d += STRIP_WIDTH) {
            const __m512 low = _mm512_loadu_ps(outputs + r * padded + d), high = _mm512_loadu_ps(outputs + r * padded + d + LANES);
            const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor));
            _mm512_mask_storeu_epi16(to + d, first_of(call.width - d), (__m512i)both);
        }
    }
}

void attend(const Attention& call, int64_t head, int64_t first, int64_t count, const uint16_t* keys, const uint16_t* values,
            void* memory) {
    const Scratch s = scratch_of(call, memory);
    const int64_t padded = padded_width(call), depth = parts_of(call.width, 2), tiles = parts_of(count, ROWS);
    const float factor = float(double(call.scale) * 1.4426950408889634);  // powers of two, not of e
    for (int64_t t = 0; t < tiles; ++t)
        load_queries(call, head, first + t * ROWS, count - t * ROWS, s.queries + t * ROWS * padded);
    for (int64_t i = 0; i < tiles * LANES; ++i) s.tops[i] = -__builtin_inff(), s.totals[i] = 0;

    for (int64_t key = 0; key < call.keys; key += KEY_BLOCK, keys += packed_block(call), values += packed_block(call)) {
        const int64_t present = least(KEY_BLOCK, call.keys - key);
        const int64_t used = round_up(present, STRIP_WIDTH);
        for (int64_t t = 0; t < tiles; ++t) {
            alignas(64) float kept[LANES];
            for (int64_t k = 0; k < used; k += STRIP_WIDTH)
                score(s.queries + t * ROWS * padded, keys + k * padded, depth, factor, s.scores + k);
            softmax(s.scores, s.weights, present, used, s.tops + t * LANES, s.totals + t * LANES, kept);
            for (int64_t d = 0; d < padded; d += STRIP_WIDTH)
                weigh(s.weights, values + d * KEY_BLOCK, used / 2, kept, key == 0, s.outputs + t * ROWS * padded + d, padded);
        }
    }
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t rows = least(ROWS, count - t * ROWS);
        store_outputs(call, head, first + t * ROWS, rows, s.outputs + t * ROWS * padded, s.totals + t * LANES);
    }
}

}  // namespace

const AttentionKernels avx512_attention = {pack, attend, scratch_bytes};

}  // namespace attar
