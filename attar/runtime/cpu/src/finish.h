// The end of a tile: sums of integers become outputs.
#pragma once

#include "gelu.h"

namespace attar {
namespace {

// Row `r` of the last range of the depth -> y; `sums` (rows, STRIP).
template <int STRIP>
INLINE void finish_row(const Tile& t, int r, const int32_t* sums) {
    char* y = static_cast<char*>(t.y) + r * t.y_stride * width(t.y_dtype);
    for (int i = 0; i < t.cols; i += LANES) {
        Floats f = __builtin_convertvector(load<Ints>(sums + r * STRIP + i) + t.offset[r], Floats);
        f = f * t.row_scale[r] * load_some(t.scale, i, FLOAT32, t.cols - i);
        if (t.bias) f = f + load_some(t.bias, i, FLOAT32, t.cols - i);
        if (t.gelu) f = t.gelu == GELU_TANH ? gelu_tanh(f) : gelu_erf(f);
        store_some(y, i, t.y_dtype, t.cols - i, f);
    }
}

}  // namespace
}  // namespace attar
