// Matrix registers (AMX): one instruction adds the products of 16 rows and 16 outputs over 64 k.
//
// Four registers hold the sums of 32 rows and 32 outputs, two each the codes of rows and of outputs, so that every
// register that is loaded is used twice. Strips of weights have the layout of the dot products of bytes (tile.h):
// sixteen steps of it are a register.
#include "finish.h"
#include "learning.h"
#include "matrices.h"
#include "rotate_matrices.h"
#include "rows.h"
#include "weights.h"

namespace attar {
namespace {

constexpr int ROWS = 2 * SIDE, STRIP = 2 * SIDE;
constexpr int64_t RUN = 64;     // k of a register
constexpr int DEPTH = 640;      // k of a tile: its rows stay in the L1 cache while strips go by
constexpr int PANEL = 1 << 20;  // these processors have 2 MB of L2 cache

// A tile whose sums are complete. Its outputs are computed between the instructions of the next tile, since matrices
// and vectors are multiplied by different units.
struct Pending {
    Tile tile;
    int rows = 0, done = 0;
    const int32_t* sums;
    alignas(64) int32_t own[2][ROWS * STRIP];  // of tiles that have the whole depth, in turns
    alignas(64) float added[ROWS * STRIP];     // by its branch
    int turn = 0;

    INLINE void finish(int count) {
        for (const int end = done + count < rows ? done + count : rows; done < end; ++done)
            finish_row<STRIP>(tile, done, sums);
    }
};

thread_local Pending pending;

void* enter() {
    pending.rows = pending.done = 0;
    begin_matrices();
    return &pending;
}

void leave(void* state) {
    static_cast<Pending*>(state)->finish(ROWS);
    end_matrices();
}

// The last rotation of a call with matrices, if its factors fill them; others, and what has no memory, without.
struct MatrixRotation {
    Rotation rotation;
    int step = -1;

    explicit MatrixRotation(const Linear& call) {
        for (int s = 0; s < call.n_steps; ++s) {
            const Step& some = call.steps[s];
            if (some.kind == KRONECKER && some.rows >= SIDE && some.cols >= SIDE) step = s;
        }
        static thread_local Buffer buffer;
        if (step < 0) return;
        rotation.prepare(call.steps[step], call.act_bits, buffer);
        if (!rotation.x.data) step = -1;
    }
    INLINE void operator()(const Linear& call, int s, float* x, float* other) const {
        if (s == step)
            rotation.rotate(x);
        else
            RowRotation()(call, s, x, other);
    }
};

// `count` rows from `row` on -> (padded / 64, ROWS, 64).
void quantize_lines(const Linear& call, int64_t row, int64_t count, int64_t padded, void* scratch, int8_t* tile,
                    float* scale, int32_t* offset) {
    float *x = static_cast<float*>(scratch), *other = x + padded;
    const MatrixRotation rotate(call);
    if (rotate.step >= 0) begin_matrices();
    for (int64_t r = 0; r < count; ++r)
        quantize_row<RUN, ROWS * RUN>(call, row + r, padded, x, other, tile + r * RUN, scale + r, offset + r, rotate);
    if (rotate.step >= 0) end_matrices();
}

// Registers 4, 5: rows; 6, 7: outputs.
template <bool TWO>
INLINE void accumulate(const Tile& t, int32_t* sums, Pending& last) {
    constexpr int STRIDE = STRIP * 4;
    begin_sums(t.begin, sums, STRIDE);
    const int8_t* x = t.x;
    const uint8_t* strip = t.strip;
    const int steps = int((t.depth + RUN / 4 - 1) / (RUN / 4));
    const int each = (last.rows - last.done + steps - 1) / steps;
    for (int step = 0; step < steps; ++step, x += ROWS * RUN, strip += STRIP * RUN) {
        _tile_loadd(4, x, RUN);
        _tile_loadd(6, strip, STRIDE);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, strip + SIDE * 4, STRIDE);
        _tile_dpbsud(1, 4, 7);
        if (TWO) {
            _tile_loadd(5, x + SIDE * RUN, RUN);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        last.finish(each);
    }
    store_sums(sums, STRIDE);
}

// low · up of a tile, by bfloat16 numbers and float32 sums. Registers as above.
template <bool TWO>
INLINE void multiply_matrices(const Branch& branch, float* added) {
    constexpr int STRIDE = STRIP * 4;
    constexpr int64_t DEPTH = RUN / 2;  // numbers in a row of a register
    const uint16_t* low = static_cast<const uint16_t*>(branch.low);
    const uint16_t* up = static_cast<const uint16_t*>(branch.up);
    begin_sums(true, added, STRIDE);
    for (int64_t k = 0; k < branch.rank; k += DEPTH, low += DEPTH, up += DEPTH * branch.stride) {
        _tile_loadd(4, low, 2 * branch.rank);
        _tile_loadd(6, up, 4 * branch.stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, up + 2 * SIDE, 4 * branch.stride);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) {
            _tile_loadd(5, low + SIDE * branch.rank, 2 * branch.rank);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    store_sums(added, STRIDE);
}

void tile(int rows, const Tile& t) {
    Pending& last = *static_cast<Pending*>(t.state);
    int32_t* sums = t.sums ? t.sums : last.own[last.turn ^= 1];
    if (rows > SIDE)
        accumulate<true>(t, sums, last);
    else
        accumulate<false>(t, sums, last);
    if (!t.end) return;
    last.tile = t, last.rows = rows, last.done = 0, last.sums = sums;
    if (!t.branch.rank) return;
    last.tile.added = last.added;
    if (!t.branch.matrices)
        multiply_rows<STRIP>(t.branch, rows, last.added);
    else if (rows > SIDE)
        multiply_matrices<true>(t.branch, last.added);
    else
        multiply_matrices<false>(t.branch, last.added);
}

}  // namespace

const Kernels amx_kernels = {"amx-int8",
                             STRIP,
                             ROWS,
                             DEPTH,
                             PANEL,
                             enter,
                             leave,
                             quantize_lines,
                             unpack<STRIP>,
                             tile,
                             nullptr,
                             dequantize,
                             fake_quantize,
                             fake_quantize_backward,
                             kronecker,
                             kronecker_backward,
                             cayley,
                             cayley_backward};

}  // namespace attar
