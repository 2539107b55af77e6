// The Cayley map of small matrices with its gradient, for which LAPACK and a dozen operators cost more than the arithmetic.
#pragma once

#include "rotate.h"

namespace attar {
namespace {

// x (rows, cols) -> y (cols, rows)
void transpose_matrix(const float* x, int64_t rows, int64_t cols, float* y) {
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < cols; j += LANES) {
            Ints tile[LANES] = {};
            for (int64_t k = 0; k < LANES && i + k < rows; ++k)
                tile[k] = bits_of<Ints>(load_some(x + (i + k) * cols, j, FLOAT32, cols - j));
            transpose(tile);
            for (int64_t k = 0; k < LANES && j + k < cols; ++k)
                store_some(y + (j + k) * rows, i, FLOAT32, rows - i, bits_of<Floats>(tile[k]));
        }
}

// In place, by elimination without pivoting: the symmetric part of I + K is I, so no pivot is below 1.
void invert(float* matrix, int64_t n) {
    for (int64_t k = 0; k < n; ++k) {
        float* row = matrix + k * n;
        const Wide pivot = everywhere(row[k]);
        row[k] = 1;
        for (int64_t j = 0; j < n; j += WIDE) store_wide(row + j, n - j, load_wide(row + j, n - j) / pivot);
        for (int64_t i = 0; i < n; ++i) {
            if (i == k) continue;
            float* other = matrix + i * n;
            const Wide factor = everywhere(-other[k]);
            other[k] = 0;
            for (int64_t j = 0; j < n; j += WIDE)
                store_wide(other + j, n - j,
                           multiply_add(factor, load_wide(row + j, n - j), load_wide(other + j, n - j)));
        }
    }
}

// K = (A − Aᵀ)/2, A = tril(p, −1);  inverse = (I + K)^{-1},  rotation = 2 · inverse − I.
void cayley(const Cayley& call, int64_t index) {
    const int64_t n = call.n, at = index * n * n;
    const float* p = call.parameter + at;
    float *inverse = call.inverse + at, *rotation = call.rotation + at;
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < i; ++j) {
            inverse[i * n + j] = 0.5f * p[i * n + j];
            inverse[j * n + i] = -inverse[i * n + j];
        }
        inverse[i * n + i] = 1;
    }
    invert(inverse, n);
    for (int64_t i = 0; i < n * n; ++i) rotation[i] = 2 * inverse[i];
    for (int64_t i = 0; i < n; ++i) rotation[i * (n + 1)] -= 1;
}

// With G = inverseᵀ · ∂rotation · inverseᵀ:  ∂p = tril(Gᵀ − G, −1).
void cayley_backward(const Cayley& call, int64_t index, float* scratch) {
    const int64_t n = call.n, at = index * n * n;
    const float* inverse = call.inverse + at;
    float *transposed = scratch, *half = transposed + n * n, *whole = half + n * n, *out = call.grad_parameter + at;
    transpose_matrix(inverse, n, n, transposed);
    multiply({inverse, call.grad + at, half, 1, n, n, n, false}, n);
    multiply({half, transposed, whole, n, 1, n, n, false}, n);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) out[i * n + j] = j < i ? whole[j * n + i] - whole[i * n + j] : 0;
}

}  // namespace
}  // namespace attar
