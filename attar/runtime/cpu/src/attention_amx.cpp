// Attention with matrix registers: as attention_avx512.cpp, with tiles of 32 queries. Scores of a whole block do not
// stay in the first-level cache, those of a strip do. So after the first blocks, in which the largest score of a query
// often changes, weights of a strip are relative to the largest score so far, and computed between the products of the
// next strip.
#include "attention_rows.h"
#include "matrices.h"

namespace attar {
namespace {

constexpr int ROWS = 2 * SIDE;
constexpr int64_t BLOCK = 16 * ROWS;
constexpr int64_t KEY_BLOCK = 256;
constexpr int64_t EARLY = 3 * KEY_BLOCK;  // keys of the first blocks
constexpr int64_t DEPTH = 32;             // bfloat16 numbers in a row of a register
// Rows lie a cache line farther apart than they are long: powers of two would put them all into few places of a cache.
constexpr int64_t SCORES = KEY_BLOCK + LANES;
constexpr int64_t WEIGHTS = KEY_BLOCK + 2 * LANES;

int64_t query_stride(const Attention& call) { return padded_width(call) + 2 * LANES; }
int64_t output_stride(const Attention& call) { return padded_width(call) + LANES; }

// The state of a task; everything of a tile lies together.
struct Scratch {
    uint16_t* queries;  // (tiles, ROWS, query_stride)
    float* outputs;     // (tiles, ROWS, output_stride), not yet divided
    float* tops;        // (tiles, ROWS) largest exponents so far
    float* totals;      // (tiles, ROWS) sums of the exponentials so far
    float* sums;        // (tiles, ROWS, LANES) what the totals lack
    float* scores;      // (ROWS, SCORES)
    uint16_t* weights;  // (ROWS, WEIGHTS)
};

Scratch scratch_of(const Attention& call, void* memory) {
    Scratch s;
    s.outputs = static_cast<float*>(memory);
    s.sums = s.outputs + BLOCK * output_stride(call);
    s.scores = s.sums + BLOCK * LANES;
    s.tops = s.scores + ROWS * SCORES;
    s.totals = s.tops + BLOCK;
    s.queries = reinterpret_cast<uint16_t*>(s.totals + BLOCK);
    s.weights = s.queries + BLOCK * query_stride(call);
    return s;
}

int64_t scratch_bytes(const Attention& call) {
    return (BLOCK * (output_stride(call) + LANES + 2) + ROWS * SCORES) * 4 +
           (BLOCK * query_stride(call) + ROWS * WEIGHTS) * 2;
}

// A tile's part of the state, and a block of keys.
struct Tile {
    const uint16_t *queries, *keys;
    float *outputs, *tops, *totals, *sums, *scores;
    uint16_t* weights;
    int64_t padded, query_row, output_row;
    float factor;  // of products, which makes them exponents of two
};

// rows (ROWS, stride) times two strips (steps · DEPTH / 2, SIDE, 2) that are `apart`, added to what is in
// out (ROWS, out_stride). Registers 4, 5: rows; 6, 7: columns. `work` is done after each product.
template <class Work>
INLINE void multiply(const uint16_t* rows, int64_t stride, const uint16_t* strip, int64_t apart, int64_t steps,
                     bool begin, float* out, int64_t out_stride, Work&& work) {
    stride *= 2, out_stride *= 4;
    begin_sums(begin, out, out_stride);
    const uint16_t* below = rows + SIDE * stride / 2;
    for (int64_t i = 0; i < steps; ++i, rows += DEPTH, below += DEPTH, strip += DEPTH * SIDE) {
        _tile_loadd(4, rows, stride);
        _tile_loadd(6, strip, 4 * SIDE);
        _tile_dpbf16ps(0, 4, 6);
        work();
        _tile_loadd(7, strip + apart, 4 * SIDE);
        _tile_dpbf16ps(1, 4, 7);
        work();
        _tile_loadd(5, below, stride);
        _tile_dpbf16ps(2, 5, 6);
        work();
        _tile_dpbf16ps(3, 5, 7);
        work();
    }
    store_sums(out, out_stride);
}

const auto nothing = [] {};

// Work that does `task` for each row of a tile when it is called `calls` times.
template <class Task>
INLINE auto spread(int64_t calls, Task task) {
    return [=, credit = int64_t(0), row = 0]() mutable {
        for (credit += ROWS; credit >= calls; credit -= calls) task(row++);
    };
}

// Scores of STRIP_WIDTH keys from `key` on.
template <class Work>
INLINE void score(const Tile& t, int64_t key, float* scores, Work&& work) {
    multiply(t.queries, t.query_row, t.keys + key * t.padded, SIDE * t.padded, t.padded / DEPTH, true, scores, SCORES,
             work);
}

// What was summed for a row, times what is kept of it, where that is not everything.
INLINE void correct(const Tile& t, int r, float kept) {
    if (kept == 1.0f) return;
    const __m512 factor = _mm512_set1_ps(kept);
    for (float *out = t.outputs + r * t.output_row, *end = out + t.padded; out < end; out += LANES)
        _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_loadu_ps(out), factor));
    _mm512_storeu_ps(t.sums + r * LANES, _mm512_mul_ps(_mm512_loadu_ps(t.sums + r * LANES), factor));
}

// The weights of a block of which `present` keys are there, relative to its largest scores.
void weigh_block(const Tile& t, int64_t present, bool begin) {
    float kept[ROWS];
    const int64_t used = round_up(present, STRIP_WIDTH);
    for (int64_t k = 0; k < used; k += STRIP_WIDTH) score(t, k, t.scores + k, nothing);
    settle();
    for (int r = 0; r < ROWS; r += LANES)
        softmax<LANES>(t.scores + r * SCORES, SCORES, t.weights + r * WEIGHTS, WEIGHTS, t.factor, present, used,
                       t.tops + r, t.totals + r, kept + r);
    if (!begin)
        for (int r = 0; r < ROWS; ++r) correct(t, r, kept[r]);
}

// The largest exponent that `weigh` takes, where exponents are small enough for a product and a difference to be
// rounded but once. Elsewhere what makes all weights too large.
INLINE float limit_of(float top) { return __builtin_fabsf(top) < 4096 ? top : -__builtin_inff(); }

// A row has a new largest exponent: the weights of the block's keys before `key` shrink, and so does what was summed.
void raise(const Tile& t, int64_t key, int r, float top) {
    const __m512 kept = exp2_of(_mm512_set1_ps(t.tops[r] - top));
    t.tops[r] = top;
    t.totals[r] *= _mm512_cvtss_f32(kept);
    correct(t, r, _mm512_cvtss_f32(kept));
    for (uint16_t *w = t.weights + r * WEIGHTS, *end = w + key; w < end; w += LANES) {
        const Halves some = load<Halves>(w);
        const __m512 wide = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)some), 16);
        store(w, _mm512_cvtneps_pbh(_mm512_mul_ps(wide, kept)));
    }
}

// As `weigh`, whatever the scores.
__attribute__((noinline)) void weigh_anew(const Tile& t, const float* scores, int64_t key, int r, float* limits) {
    const __m512 scale = _mm512_set1_ps(t.factor);
    const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(scores + r * SCORES), scale);
    const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(scores + r * SCORES + LANES), scale);
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(low, high));
    if (largest > t.tops[r]) raise(t, key, r, largest);
    limits[r] = limit_of(t.tops[r]);
    const __m512 top = _mm512_set1_ps(t.tops[r]);
    _mm512_storeu_si512(t.weights + r * WEIGHTS + key, weights_of(_mm512_sub_ps(low, top), _mm512_sub_ps(high, top)));
}

// The weights of a row, of STRIP_WIDTH keys from `key` on, from their scores (ROWS, SCORES). A weight above one, or
// that is not a number, calls for another look.
INLINE void weigh(const Tile& t, const float* scores, int64_t key, int r, float* limits) {
    const __m512 scale = _mm512_set1_ps(t.factor), top = _mm512_set1_ps(limits[r]);
    const __m512 low = _mm512_fmsub_ps(_mm512_loadu_ps(scores + r * SCORES), scale, top);
    const __m512 high = _mm512_fmsub_ps(_mm512_loadu_ps(scores + r * SCORES + LANES), scale, top);
    const __m512i both = weights_of(low, high), one = _mm512_set1_epi16(0x3f80);
    _mm512_storeu_si512(t.weights + r * WEIGHTS + key, both);
    if (__builtin_expect(_mm512_cmpgt_epu16_mask(both, one), 0)) weigh_anew(t, scores, key, r, limits);
}

// The weights of a whole block, relative to the largest scores so far.
void weigh_block_quickly(const Tile& t) {
    float limits[ROWS];
    for (int r = 0; r < ROWS; ++r) limits[r] = limit_of(t.tops[r]);
    float *now = t.scores, *next = t.scores + STRIP_WIDTH;
    score(t, 0, now, nothing);
    for (int64_t key = 0;; key += STRIP_WIDTH) {
        settle();
        const auto task = [&](int r) { weigh(t, now, key, r, limits); };
        if (key + STRIP_WIDTH == KEY_BLOCK) {
            for (int r = 0; r < ROWS; ++r) task(r);
            return;
        }
        score(t, key + STRIP_WIDTH, next, spread(t.padded / DEPTH * 4, task));
        float* last = now;
        now = next, next = last;
    }
}

// Adds the weights of a row of a whole block.
INLINE void add_up(const Tile& t, int r) {
    __m512 sum = _mm512_loadu_ps(t.sums + r * LANES);
    UNROLL for (int64_t k = 0; k < KEY_BLOCK; k += STRIP_WIDTH)
        sum = plus(sum, _mm512_loadu_si512(t.weights + r * WEIGHTS + k));
    _mm512_storeu_ps(t.sums + r * LANES, sum);
}

// Adds the products of a block's weights, of which `used` are there, with its values to the outputs.
template <class Work>
INLINE void add_products(const Tile& t, const uint16_t* values, int64_t used, bool begin, Work work) {
    for (int64_t d = 0; d < t.padded; d += STRIP_WIDTH)
        multiply(t.weights, WEIGHTS, values + d * KEY_BLOCK, SIDE * KEY_BLOCK, used / DEPTH, begin, t.outputs + d,
                 t.output_row, work);
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
    for (int64_t i = 0; i < tiles * ROWS * LANES; ++i) s.sums[i] = 0;
    settle();

    begin_matrices();
    for (int64_t key = 0; key < call.keys; key += KEY_BLOCK, keys += KEY_BLOCK * padded, values += KEY_BLOCK * padded) {
        const int64_t present = least(KEY_BLOCK, call.keys - key);
        for (int64_t row = 0; row < tiles * ROWS; row += ROWS) {
            const Tile t = {
                s.queries + row * query_row, keys, s.outputs + row * output_row, s.tops + row, s.totals + row,
                s.sums + row * LANES, s.scores, s.weights, padded, query_row, output_row, factor};
            if (key >= EARLY && present == KEY_BLOCK) {
                weigh_block_quickly(t);
                settle();
                add_products(t, values, KEY_BLOCK, false,
                             spread(padded / STRIP_WIDTH * (KEY_BLOCK / DEPTH) * 4, [&](int r) { add_up(t, r); }));
            } else {
                weigh_block(t, present, key == 0);
                settle();
                add_products(t, values, round_up(present, DEPTH), key == 0, nothing);
            }
        }
    }
    end_matrices();
    for (int64_t r = 0; r < tiles * ROWS; ++r) s.totals[r] += _mm512_reduce_add_ps(_mm512_loadu_ps(s.sums + r * LANES));
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t rows = least(ROWS, count - t * ROWS);
        store_outputs(call, head, first + t * ROWS, rows, s.outputs + t * ROWS * output_row, output_row, s.totals + t * ROWS);
    }
}

}  // namespace

const AttentionKernels amx_attention = {
    "amx-bf16", ROWS, BLOCK, KEY_BLOCK, pack<KEY_BLOCK, SIDE>, attend, scratch_bytes};

}  // namespace attar
