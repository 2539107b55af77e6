// The transforms of a row, as transforms.py defines them, but for the order of the sums in a rotation.
#pragma once

#include "vectors.h"

namespace attar {
namespace {

// The a and c of a small product c (m, n) = a · b, b (k, n): a(i, j) is a[i·down + j·right].
struct Product {
    const float *a, *b;
    float* c;
    int64_t down, right, k, n;
    bool add;  // c += a · b
};

constexpr int COLUMNS = WIDE == 16 ? 4 : 2;  // registers of a row of the tile, of which there are 16, or 32

// ROWS rows from i on, COLS registers from `column` on, of which the last one has `count` columns.
template <int ROWS, int COLS>
void multiply_tile(const Product& p, int64_t i, int64_t column, int64_t count) {
    Wide sum[ROWS][COLS];
    float* to = p.c + i * p.n + column;
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int c = 0; c < COLS; ++c)
            sum[r][c] = p.add ? load_wide(to + r * p.n + c * WIDE, c + 1 < COLS ? WIDE : count) : Wide{};
    const float *a = p.a + i * p.down, *b = p.b + column;
    for (int64_t j = 0; j < p.k; ++j, a += p.right, b += p.n) {
        Wide row[COLS];
        UNROLL for (int c = 0; c < COLS; ++c) row[c] = load_wide(b + c * WIDE, c + 1 < COLS ? WIDE : count);
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const Wide factor = everywhere(a[r * p.down]);
            UNROLL for (int c = 0; c < COLS; ++c) sum[r][c] = multiply_add(factor, row[c], sum[r][c]);
        }
    }
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int c = 0; c < COLS; ++c)
            store_wide(to + r * p.n + c * WIDE, c + 1 < COLS ? WIDE : count, sum[r][c]);
}

template <int COLS>
struct Columns {
    // At most COLS registers of columns, of which the last one has `count`.
    static void multiply(const Product& p, int64_t m, int64_t column, int registers, int64_t count) {
        if (registers < COLS) return Columns<COLS - 1>::multiply(p, m, column, registers, count);
        int64_t i = 0;
        for (; i + 6 <= m; i += 6) multiply_tile<6, COLS>(p, i, column, count);
        for (; i + 4 <= m; i += 4) multiply_tile<4, COLS>(p, i, column, count);
        for (; i + 2 <= m; i += 2) multiply_tile<2, COLS>(p, i, column, count);
        for (; i < m; ++i) multiply_tile<1, COLS>(p, i, column, count);
    }
};

template <>
struct Columns<0> {
    static void multiply(const Product&, int64_t, int64_t, int, int64_t) {}
};

void multiply(const Product& p, int64_t m) {
    for (int64_t column = 0; column < p.n; column += COLUMNS * WIDE) {
        const int64_t left = p.n - column;
        const bool full = left >= COLUMNS * WIDE;
        Columns<COLUMNS>::multiply(p, m, column, full ? COLUMNS : int((left + WIDE - 1) / WIDE),
                                   full ? WIDE : (left - 1) % WIDE + 1);
    }
}

template <int STEP>
INLINE Wide butterfly(Wide v) {
    if (STEP >= WIDE) return v;
    const WideInts sign = ((LANE & STEP) != 0) & INT32_MIN;
    return swap_lanes<STEP>(v) + bits_of<Wide>(bits_of<WideInts>(v) ^ sign);
}

// Unnormalised Walsh-Hadamard transform of n numbers, n a power of two.
void walsh_hadamard(float* x, int64_t n) {
    if (n < WIDE) {
        for (int64_t stride = 1; stride < n; stride *= 2)
            for (int64_t i = 0; i < n; ++i)
                if (!(i & stride)) {
                    float u = x[i], v = x[i + stride];
                    x[i] = u + v, x[i + stride] = u - v;
                }
        return;
    }
    for (int64_t i = 0; i < n; i += WIDE)
        store(x + i, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load<Wide>(x + i))))));
    for (int64_t stride = WIDE; stride < n; stride *= 2)
        for (int64_t i = 0; i < n; i += 2 * stride)
            for (int64_t j = i; j < i + stride; j += WIDE) {
                Wide u = load<Wide>(x + j), v = load<Wide>(x + j + stride);
                store(x + j, u + v), store(x + j + stride, u - v);
            }
}

void hadamard(const Step& step, float* x, float* other, int64_t k) {
    const int64_t order = step.rows, block = order * step.cols;
    for (int64_t i = 0; i < k; ++i) x[i] *= step.a[i];
    for (int64_t i = 0; i < k; i += step.cols) walsh_hadamard(x + i, step.cols);
    if (order > 1) {
        for (int64_t i = 0; i < k; i += block)
            multiply({step.b, x + i, other + i, order, 1, order, step.cols, false}, order);
        memcpy(x, other, k * sizeof *x);
    }
    const float norm = float(1.0 / __builtin_sqrt(double(block)));
    for (int64_t i = 0; i < k; ++i) x[i] *= norm;
}

// `count` rows x (l, r) -> y = leftᵀ · (x · right), which may be x; `other` is room for as many numbers.
void rotate_kronecker(const float* left, const float* right, int64_t l, int64_t r, int64_t count, const float* x,
                      float* other, float* y) {
    multiply({x, right, other, r, 1, r, r, false}, count * l);
    for (int64_t i = 0; i < count; ++i)
        multiply({left, other + i * l * r, y + i * l * r, 1, l, l, r, false}, l);
}

// How a row is rotated: x (k,) in place; `other` is room for as many numbers. `step`: which one of the call's.
struct RowRotation {
    INLINE void operator()(const Linear& call, int step, float* x, float* other) const {
        const Step& s = call.steps[step];
        rotate_kronecker(s.a, s.b, s.rows, s.cols, 1, x, other, x);
    }
};

// Steps of `call` from `first` on of x (k,), in place; `other` is room for as many numbers.
template <class Rotate>
void transform(const Linear& call, int first, float* x, float* other, const Rotate& rotate) {
    const int64_t k = call.weight.k;
    for (int s = first; s < call.n_steps; ++s) {
        const Step& step = call.steps[s];
        if (step.kind == CHANNEL_SCALE)
            for (int64_t i = 0; i < k; ++i) x[i] /= step.a[i];
        else if (step.kind == CHANNEL_SHIFT)
            for (int64_t i = 0; i < k; ++i) x[i] -= step.a[i];
        else if (step.kind == HADAMARD)
            hadamard(step, x, other, k);
        else
            rotate(call, s, x, other);
    }
}

}  // namespace
}  // namespace attar
