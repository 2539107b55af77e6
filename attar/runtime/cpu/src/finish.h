// The end of a tile: sums of integers become outputs.
#pragma once

#include "gelu.h"
#include "pieces.h"

namespace attar {
namespace {

constexpr int BRANCH_ROWS = 4;  // of a tile at most that are multiplied at once

// low · up of `rows` rows of a strip -> added (rows rounded up to BRANCH_ROWS, STRIP). Rows that are not there repeat the
// last one.
template <int STRIP>
INLINE void multiply_rows(const Branch& branch, int rows, float* added) {
    constexpr int VECTORS = STRIP / WIDE, ROWS = int(least(BRANCH_ROWS, 8 / VECTORS));
    for (int first = 0; first < rows; first += ROWS) {
        const float *low[ROWS], *up = static_cast<const float*>(branch.up);
        Wide sums[ROWS][VECTORS] = {};
        UNROLL for (int r = 0; r < ROWS; ++r)
            low[r] = static_cast<const float*>(branch.low) + least(first + r, rows - 1) * branch.rank;
        for (int64_t j = 0; j < branch.rank; ++j, up += branch.stride)
            UNROLL for (int r = 0; r < ROWS; ++r)
                UNROLL for (int v = 0; v < VECTORS; ++v)
                    sums[r][v] = multiply_add(everywhere(low[r][j]), load<Wide>(up + v * WIDE), sums[r][v]);
        UNROLL for (int r = 0; r < ROWS; ++r)
            UNROLL for (int v = 0; v < VECTORS; ++v) store(added + (first + r) * STRIP + v * WIDE, sums[r][v]);
    }
}

// Row `r` of the last range of the depth -> y; `sums` (rows, STRIP).
template <int STRIP>
INLINE void finish_row(const Tile& t, int r, const int32_t* sums) {
    char* y = static_cast<char*>(t.y) + r * t.y_stride * width(t.y_dtype);
    for (int i = 0; i < t.cols; i += LANES) {
        Floats f = floats_of(load<Ints>(sums + r * STRIP + i) + t.offset[r]);
        f = f * t.row_scale[r] * load_some(t.scale, i, FLOAT32, t.cols - i);
        if (t.bias) f = f + load_some(t.bias, i, FLOAT32, t.cols - i);
        if (t.added) f = f + load<Floats>(t.added + r * STRIP + i);
        if (t.gelu) f = t.gelu == GELU_TANH ? gelu_tanh(f) : gelu_erf(f);
        store_some(y, i, t.y_dtype, t.cols - i, f);
    }
}

}  // namespace
}  // namespace attar
