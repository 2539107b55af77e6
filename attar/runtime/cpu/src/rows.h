// A row of activations: transforms, step size, integer codes. The arithmetic is that of reference.py and
// transforms.py, operation for operation, but for the order of the sums in a rotation.
#pragma once

#include "vectors.h"

namespace attar {
namespace {

// c (m, n) = a · b for small matrices, a(i, j) = a[i·si + j·sj], b (k, n) row-major.
template <int ROWS>
INLINE void multiply_rows(const float* a, int64_t si, int64_t sj, const float* b, float* c, int64_t i, int64_t k,
                          int64_t n, int64_t column, int64_t count) {
    Floats sum[ROWS] = {};
    for (int64_t j = 0; j < k; ++j) {
        Floats v = load_some(b, j * n + column, FLOAT32, count);
        for (int r = 0; r < ROWS; ++r) sum[r] += v * a[(i + r) * si + j * sj];
    }
    for (int r = 0; r < ROWS; ++r) store_some(c, (i + r) * n + column, FLOAT32, count, sum[r]);
}

void multiply(const float* a, int64_t si, int64_t sj, const float* b, float* c, int64_t m, int64_t k, int64_t n) {
    for (int64_t column = 0; column < n; column += LANES) {
        int64_t i = 0, count = n - column;
        for (; i + 8 <= m; i += 8) multiply_rows<8>(a, si, sj, b, c, i, k, n, column, count);
        for (; i < m; ++i) multiply_rows<1>(a, si, sj, b, c, i, k, n, column, count);
    }
}

// Unnormalised Walsh-Hadamard transform of n numbers, n a power of two.
void walsh_hadamard(float* x, int64_t n) {
    for (int64_t stride = 1; stride < n && stride < LANES; stride *= 2) {  // inside a vector
        for (int64_t i = 0; i < n; i += 2 * stride)
            for (int64_t j = i; j < i + stride; ++j) {
                float u = x[j], v = x[j + stride];
                x[j] = u + v, x[j + stride] = u - v;
            }
    }
    for (int64_t stride = LANES; stride < n; stride *= 2) {
        for (int64_t i = 0; i < n; i += 2 * stride)
            for (int64_t j = i; j < i + stride; j += LANES) {
                Floats u = load<Floats>(x + j), v = load<Floats>(x + j + stride);
                store(x + j, u + v), store(x + j + stride, u - v);
            }
    }
}

void hadamard(const Step& step, float* x, float* other, int64_t k) {
    int64_t block = int64_t(step.rows) * step.cols;
    float norm = 1.0f;
    norm = float(1.0 / __builtin_sqrt(double(block)));
    for (int64_t i = 0; i < k; ++i) x[i] *= step.a[i];
    for (int64_t i = 0; i < k; i += step.cols) walsh_hadamard(x + i, step.cols);
    if (step.rows > 1) {
        for (int64_t i = 0; i < k; i += block)
            multiply(step.b, step.rows, 1, x + i, other + i, step.rows, step.rows, step.cols);
        memcpy(x, other, k * sizeof *x);
    }
    for (int64_t i = 0; i < k; ++i) x[i] *= norm;
}

void transform(const Linear& call, float* x, float* other) {
    int64_t k = call.weight.k;
    for (int s = 0; s < call.n_steps; ++s) {
        const Step& step = call.steps[s];
        if (step.kind == CHANNEL_SCALE) {
            for (int64_t i = 0; i < k; ++i) x[i] /= step.a[i];
        } else if (step.kind == HADAMARD) {
            hadamard(step, x, other, k);
        } else {
            int64_t l = step.rows, r = step.cols;
            multiply(x, r, 1, step.b, other, l, r, r);
            multiply(step.a, 1, l, other, x, l, l, r);
        }
    }
}

// Integers in the order of the floats that they are the bits of; NaN lies beyond infinity.
INLINE Ints ordered(Ints bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

INLINE float from_ordered(int32_t i) { return bits_of<float>(i ^ ((i >> 31) & 0x7fffffff)); }

// Largest magnitude of a row; NaN if it holds one.
float absmax_of(const float* x, int64_t padded) {
    Ints top = {};
    for (int64_t i = 0; i < padded; i += LANES) {
        Ints magnitude = load<Ints>(x + i) & 0x7fffffff;
        top = magnitude > top ? magnitude : top;
    }
    int32_t most = 0;
    for (int i = 0; i < LANES; ++i) most = top[i] > most ? top[i] : most;
    return bits_of<float>(most);
}

void minmax_of(const float* x, int64_t padded, float* low, float* high) {
    Ints bottom = ordered(load<Ints>(x)), top = bottom;
    for (int64_t i = LANES; i < padded; i += LANES) {
        Ints v = ordered(load<Ints>(x + i));
        bottom = v < bottom ? v : bottom;
        top = v > top ? v : top;
    }
    int32_t least = bottom[0], most = top[0];
    for (int i = 1; i < LANES; ++i) {
        least = bottom[i] < least ? bottom[i] : least;
        most = top[i] > most ? top[i] : most;
    }
    *low = from_ordered(least), *high = from_ordered(most);
}

void quantize(const Linear& call, int64_t row, int64_t padded, float* scratch, int8_t* codes, float* scale,
              int32_t* offset) {
    const int64_t k = call.weight.k;
    const float most = float((1 << (call.act_bits - 1)) - 1), least = -most - 1;
    float *x = scratch, *other = scratch + padded;
    const char* from = static_cast<const char*>(call.x) + row * k * width(call.x_dtype);
    int64_t whole = k - k % LANES;
    if (call.x_dtype == FLOAT32)
        memcpy(x, from, k * sizeof *x);
    else {
        for (int64_t i = 0; i < whole; i += LANES) store(x + i, load_floats(from, i, call.x_dtype));
        if (whole < k) store(x + whole, load_some(from, whole, call.x_dtype, k - whole));
    }
    transform(call, x, other);
    for (int64_t i = k; i < padded; ++i) x[i] = x[0];  // changes no minimum and no maximum

    float low = -__builtin_inff(), high = __builtin_inff(), absmax;
    if (call.clip) {
        minmax_of(x, padded, &low, &high);
        low *= call.clip[0], high *= call.clip[1];
        float below = __builtin_fabsf(low);
        absmax = below > high || below != below ? below : high;
    } else {
        absmax = absmax_of(x, padded);
    }
    const float step = (absmax < 1e-5f ? 1e-5f : absmax) / most;

    // Adding 1.5·2^23 rounds half to even and leaves the integer in the low bits; a NaN leaves zero there.
    const Floats lows = Floats{} + low, highs = Floats{} + high;
    const Floats leasts = Floats{} + least, mosts = Floats{} + most;
    for (int64_t i = 0; i < padded; i += LANES) {
        Floats v = load<Floats>(x + i);
        v = v < lows ? lows : v;
        v = v > highs ? highs : v;
        v = v / step;
        v = v < leasts ? leasts : v;
        v = v > mosts ? mosts : v;
        store(codes + i, __builtin_convertvector(bits_of<Ints>(v + 12582912.0f), Bytes));
    }
    memset(codes + k, 0, padded - k);
    int32_t sum = 0;
    for (int64_t i = 0; i < padded; ++i) sum += codes[i];
    *scale = step;
    *offset = -sum * (1 << (call.weight.bits - 1));
}

}  // namespace
}  // namespace attar
