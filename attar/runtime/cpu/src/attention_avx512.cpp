// Attention with AVX-512 and its dot product of bfloat16 pairs: products are summed in float32.
//
// A tile of queries meets a block of keys: scores, their exponentials, the weighted values. What the softmax is
// divided by, and the outputs so far, are corrected when a later block brings a larger score (FlashAttention), so no
// more than a tile of scores is ever in memory.
#include "attention_rows.h"

namespace attar {
namespace {

constexpr int ROWS = 14;  // queries whose scores are in registers at once
constexpr int64_t BLOCK = 16 * ROWS, KEY_BLOCK = 256;

INLINE __m512bh pairs(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }

INLINE __m512bh pair_of(const uint16_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return (__m512bh)_mm512_set1_epi32(word);
}

// The state of a task; everything of a tile lies together.
struct Scratch {
    uint16_t* queries;  // (tiles, width / 2, ROWS, 2)
    float* outputs;     // (tiles, ROWS, padded width), not yet divided
    float* tops;        // (tiles, LANES) largest exponents so far
    float* totals;      // (tiles, LANES) sums of the exponentials so far
    float* scores;      // (ROWS, KEY_BLOCK)
    uint16_t* weights;  // (ROWS, KEY_BLOCK), their exponentials
};

Scratch scratch_of(const Attention& call, void* memory) {
    const int64_t elements = BLOCK * padded_width(call), tiles = BLOCK / ROWS;
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
    return BLOCK * padded_width(call) * 6 + ROWS * KEY_BLOCK * 6 + BLOCK / ROWS * LANES * 8;
}

// ROWS queries against a strip of keys over `depth` pairs of features.
INLINE void score(const uint16_t* queries, const uint16_t* strip, int64_t depth, float* out) {
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
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int v = 0; v < 2; ++v) _mm512_storeu_ps(out + r * KEY_BLOCK + v * LANES, sums[r][v]);
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

void attend(const Attention& call, int64_t head, int64_t first, int64_t count, const uint16_t* keys, const uint16_t* values,
            void* memory) {
    const Scratch s = scratch_of(call, memory);
    const int64_t padded = padded_width(call), depth = parts_of(call.width, 2), tiles = parts_of(count, ROWS);
    const float factor = float(double(call.scale) * LOG2_E);
    for (int64_t t = 0; t < tiles; ++t)
        load_queries(call, head, first + t * ROWS, count - t * ROWS, s.queries + t * ROWS * padded);
    for (int64_t i = 0; i < tiles * LANES; ++i) s.tops[i] = -__builtin_inff(), s.totals[i] = 0;

    for (int64_t key = 0; key < call.keys; key += KEY_BLOCK, keys += KEY_BLOCK * padded, values += KEY_BLOCK * padded) {
        const int64_t present = least(KEY_BLOCK, call.keys - key);
        const int64_t used = round_up(present, STRIP_WIDTH);
        for (int64_t t = 0; t < tiles; ++t) {
            alignas(64) float kept[LANES];
            for (int64_t k = 0; k < used; k += STRIP_WIDTH)
                score(s.queries + t * ROWS * padded, keys + k * padded, depth, s.scores + k);
            softmax<ROWS>(s.scores, KEY_BLOCK, s.weights, KEY_BLOCK, factor, present, used, s.tops + t * LANES,
                          s.totals + t * LANES, kept);
            for (int64_t d = 0; d < padded; d += STRIP_WIDTH)
                weigh(s.weights, values + d * KEY_BLOCK, used / 2, kept, key == 0, s.outputs + t * ROWS * padded + d, padded);
        }
    }
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t rows = least(ROWS, count - t * ROWS);
        store_outputs(call, head, first + t * ROWS, rows, s.outputs + t * ROWS * padded, padded, s.totals + t * LANES);
    }
}

}  // namespace

const AttentionKernels avx512_attention = {
    "avx512-bf16", ROWS, BLOCK, KEY_BLOCK, pack<KEY_BLOCK, STRIP_WIDTH>, attend, scratch_bytes};

}  // namespace attar
