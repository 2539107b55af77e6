// Attention with matrix registers: as attention_avx512.cpp, with tiles of 32 queries.
#include "attention_rows.h"
#include "matrices.h"

namespace attar {
namespace {

constexpr int ROWS = 2 * SIDE;
constexpr int64_t BLOCK = 16 * ROWS;
constexpr int64_t KEY_BLOCK = 256;
constexpr int64_t DEPTH = 32;  // bfloat16 numbers in a row of a register
// Rows lie a cache line farther apart than they are long: powers of two would put them all into few places of a cache.
constexpr int64_t SCORES = KEY_BLOCK + LANES;

int64_t query_stride(const Attention& call) { return padded_width(call) + 2 * LANES; }
int64_t output_stride(const Attention& call) { return padded_width(call) + LANES; }

// The state of a task; everything of a tile lies together.
struct Scratch {
    uint16_t* queries;  // (tiles, ROWS, query_stride)
    float* outputs;     // (tiles, ROWS, output_stride), not yet divided
    float* tops;        // (tiles, ROWS) largest exponents so far
    float* totals;      // (tiles, ROWS) sums of the exponentials so far
    float* scores;      // (ROWS, SCORES); their exponentials take their places, two in that of one
};

Scratch scratch_of(const Attention& call, void* memory) {
    Scratch s;
    s.outputs = static_cast<float*>(memory);
    s.scores = s.outputs + BLOCK * output_stride(call);
    s.tops = s.scores + ROWS * SCORES;
    s.totals = s.tops + BLOCK;
    s.queries = reinterpret_cast<uint16_t*>(s.totals + BLOCK);
    return s;
}

int64_t scratch_bytes(const Attention& call) {
    return (BLOCK * output_stride(call) + ROWS * SCORES + 2 * BLOCK) * 4 + BLOCK * query_stride(call) * 2;
}

// rows (ROWS, stride) times a strip (steps · DEPTH / 2, STRIP_WIDTH, 2), added to what is in out (ROWS, out_stride).
// Registers 4, 5: rows; 6, 7: columns.
INLINE void multiply(const uint16_t* rows, int64_t stride, const uint16_t* strip, int64_t steps, bool begin, float* out,
                     int64_t out_stride) {
    stride *= 2, out_stride *= 4;
    begin_sums(begin, out, out_stride);
    const uint16_t* below = rows + SIDE * stride / 2;
    for (int64_t i = 0; i < steps; ++i, rows += DEPTH, below += DEPTH, strip += DEPTH * STRIP_WIDTH) {
        _tile_loadd(4, rows, stride);
        _tile_loadd(6, strip, 4 * STRIP_WIDTH);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, strip + STRIP_WIDTH, 4 * STRIP_WIDTH);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, below, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    store_sums(out, out_stride);
}

// Rows of outputs times what is kept of them, where that is not everything.
void correct(float* outputs, int64_t stride, int64_t padded, const float* kept) {
    for (int r = 0; r < ROWS; ++r) {
        if (kept[r] == 1.0f) continue;
        const __m512 factor = _mm512_set1_ps(kept[r]);
        for (float *out = outputs + r * stride, *end = out + padded; out < end; out += LANES)
            _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_loadu_ps(out), factor));
    }
}

void load_queries(const Attention& call, int64_t head, int64_t first, int64_t count, uint16_t* to) {
    const int64_t padded = padded_width(call), stride = query_stride(call);
    for (int64_t r = 0; r < ROWS; ++r)
        for (int64_t d = 0; d < padded; d += DEPTH) {
            __m512i some = _mm512_setzero_si512();
            if (r < count) some = features(token_of(call.q, call.q_places, call, head, first + r), d, call.width);
            _mm512_storeu_si512(to + r * stride + d, some);
        }
}

void attend(const Attention& call, int64_t head, int64_t first, int64_t count, const uint16_t* keys, const uint16_t* values,
            void* memory) {
    const Scratch s = scratch_of(call, memory);
    const int64_t padded = padded_width(call), tiles = parts_of(count, ROWS);
    const int64_t query_row = query_stride(call), output_row = output_stride(call);
    const float factor = float(double(call.scale) * LOG2_E);
    for (int64_t t = 0; t < tiles; ++t)
        load_queries(call, head, first + t * ROWS, count - t * ROWS, s.queries + t * ROWS * query_row);
    for (int64_t i = 0; i < tiles * ROWS; ++i) s.tops[i] = -__builtin_inff(), s.totals[i] = 0;
    settle();

    begin_matrices();
    for (int64_t key = 0; key < call.keys; key += KEY_BLOCK, keys += KEY_BLOCK * padded, values += KEY_BLOCK * padded) {
        const int64_t present = least(KEY_BLOCK, call.keys - key);
        const int64_t used = round_up(present, STRIP_WIDTH);
        for (int64_t t = 0; t < tiles; ++t) {
            alignas(64) float kept[ROWS];
            float* outputs = s.outputs + t * ROWS * output_row;
            uint16_t* weights = reinterpret_cast<uint16_t*>(s.scores);
            for (int64_t k = 0; k < used; k += STRIP_WIDTH)
                multiply(s.queries + t * ROWS * query_row, query_row, keys + k * padded, padded / DEPTH, true,
                         s.scores + k, SCORES);
            for (int r = 0; r < ROWS; r += LANES)
                softmax<LANES>(s.scores + r * SCORES, SCORES, weights + 2 * r * SCORES, 2 * SCORES, factor, present, used,
                               s.tops + t * ROWS + r, s.totals + t * ROWS + r, kept + r);
            if (key) correct(outputs, output_row, padded, kept);
            settle();
            for (int64_t d = 0; d < padded; d += STRIP_WIDTH)
                multiply(weights, 2 * SCORES, values + d * KEY_BLOCK, used / DEPTH, key == 0, outputs + d, output_row);
        }
    }
    end_matrices();
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t rows = least(ROWS, count - t * ROWS);
        store_outputs(call, head, first + t * ROWS, rows, s.outputs + t * ROWS * output_row, output_row, s.totals + t * ROWS);
    }
}

}  // namespace

const AttentionKernels amx_attention = {"amx-bf16", ROWS, BLOCK, KEY_BLOCK, pack<KEY_BLOCK>, attend, scratch_bytes};

}  // namespace attar
