// What training repeats for each weight and activation: fake quantization and the Kronecker rotation of rows, with
// their gradients. Values are those of formats.py bit for bit; sums run in another order.
#pragma once

#include "cayley.h"
#include "rows.h"

namespace attar {
namespace {

// Half to even, for numbers of any size, and with their sign.
INLINE Wide rounded(Wide v) {
    const WideInts sign = bits_of<WideInts>(v) & INT32_MIN;
    const Wide magnitude = bits_of<Wide>(bits_of<WideInts>(v) & INT32_MAX);
    const Wide whole = magnitude < 0x1p23f ? (magnitude + 0x1p23f) - 0x1p23f : magnitude;
    return bits_of<Wide>(bits_of<WideInts>(whole) | sign);
}

// Clamps to a range whose upper end has the last word.
INLINE Wide clamped(Wide v, Wide low, Wide high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

INLINE bool any(WideInts mask) {
    uint64_t words[WIDE / 2], found = 0;
    memcpy(words, &mask, sizeof words);
    for (uint64_t word : words) found |= word;
    return found != 0;
}

INLINE float sum_of(Wide v) {
    float sum = 0;
    for (int i = 0; i < WIDE; ++i) sum += v[i];
    return sum;
}

// The extremes of a row, or NaN twice if it holds one.
void extremes_of(const float* x, int64_t k, float* smallest, float* largest) {
    float least = __builtin_inff(), most = -least;
    bool undefined = false;
    Wide bottom = everywhere(least), top = everywhere(most);
    WideInts unequal = {};
    int64_t i = 0;
    for (; i + WIDE <= k; i += WIDE) {
        const Wide v = load<Wide>(x + i);
        bottom = v < bottom ? v : bottom;
        top = v > top ? v : top;
        unequal |= v != v;
    }
    for (int lane = 0; lane < WIDE; ++lane) {
        least = bottom[lane] < least ? bottom[lane] : least;
        most = top[lane] > most ? top[lane] : most;
    }
    for (; i < k; ++i) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
        undefined |= x[i] != x[i];
    }
    undefined |= any(unequal);
    *smallest = undefined ? __builtin_nanf("") : least;
    *largest = undefined ? __builtin_nanf("") : most;
}

// The first place of a number that the row holds.
int64_t place_of(const float* x, int64_t k, float value) {
    int64_t i = 0;
    while (i + WIDE <= k && !any(load<Wide>(x + i) == value)) i += WIDE;
    while (i < k && x[i] != value) ++i;
    return i < k ? i : 0;  // a row with NaN
}

// The range that a row is clamped to, and its step size.
struct Range {
    float low, high, step;
    Range(const FakeQuantize& call, int64_t row)
        : low(call.smallest[row] * call.low_factor[row * call.stride]),
          high(call.largest[row] * call.high_factor[row * call.stride]),
          step(call.full_range ? signed_step_of(low, high, call.bits) : step_of(magnitude_of(low, high), call.bits)) {}
};

void fake_quantize(const FakeQuantize& call, int64_t row) {
    const int64_t k = call.k;
    const float* x = call.x + row * k;
    float* y = call.y + row * k;
    extremes_of(x, k, call.smallest + row, call.largest + row);
    const Range range(call, row);
    const Wide low = everywhere(range.low), high = everywhere(range.high), step = everywhere(range.step);
    for (int64_t i = 0; i < k; i += WIDE) {
        const Wide steps = clamped(load_wide(x + i, k - i), low, high) / step;
        store_wide(y + i, k - i, rounded(steps) * step);
    }
}

// Identity through the rounding and inside the range. What lies outside moves its end, the step size moves with the
// larger end, and the ends move with the row's extremes and with the factors.
void fake_quantize_backward(const FakeQuantize& call, int64_t row) {
    const int64_t k = call.k;
    const float *x = call.x + row * k, *grad = call.grad + row * k;
    float* grad_x = call.grad_x ? call.grad_x + row * k : nullptr;
    const Range range(call, row);
    const Wide low = everywhere(range.low), high = everywhere(range.high), step = everywhere(range.step);
    Wide below = {}, above = {}, residual = {};
    for (int64_t i = 0; i < k; i += WIDE) {
        const Wide v = load_wide(x + i, k - i), g = load_wide(grad + i, k - i);
        const Wide inside = clamped(v, low, high), steps = inside / step;
        below = below + (v < inside ? g : Wide{});
        above = above + (v > inside ? g : Wide{});
        residual = multiply_add(g, rounded(steps) - steps, residual);
        if (grad_x) store_wide(grad_x + i, k - i, v == inside ? g : Wide{});
    }
    const float most = largest_code(call.bits), grad_step = sum_of(residual);
    float grad_low = sum_of(below), grad_high = sum_of(above);
    if (call.full_range) {
        const bool upper = range.high > -range.low;
        const float per_high = 1 / (most + upper), per_low = 1 / (most + !upper);
        const float by_high = range.high * per_high, by_low = -range.low * per_low, least = MIN_ABSMAX / (most + 1);
        const float signed_step = upper ? -grad_step : grad_step;
        if (by_high >= by_low && by_high > least) grad_high += signed_step * per_high;
        if (by_low > by_high && by_low > least) grad_low -= signed_step * per_low;
    } else {
        const float grad_absmax = grad_step / most, magnitude = __builtin_fabsf(range.low);
        if (range.high >= magnitude && range.high >= MIN_ABSMAX) grad_high += grad_absmax;
        if (magnitude > range.high && magnitude > MIN_ABSMAX) grad_low += range.low > 0 ? grad_absmax : -grad_absmax;
    }
    if (grad_x) {
        grad_x[place_of(x, k, call.largest[row])] += grad_high * call.high_factor[row * call.stride];
        grad_x[place_of(x, k, call.smallest[row])] += grad_low * call.low_factor[row * call.stride];
    }
    call.grad_low[row] = grad_low * call.smallest[row];
    call.grad_high[row] = grad_high * call.largest[row];
}

void kronecker(const Kronecker& call, int64_t first, int64_t last, float* scratch) {
    const int64_t l = call.l, r = call.r, batch = kronecker_batch(l, r);
    for (int64_t i = first; i < last; i += batch) {
        const int64_t count = last - i < batch ? last - i : batch;
        rotate_kronecker(call.left, call.right, l, r, count, call.x + i * l * r, scratch, call.y + i * l * r);
    }
}

// With u = left · ∂y:  ∂x = u · rightᵀ,  ∂left = Σ (x · right) · ∂yᵀ,  ∂right = Σ xᵀ · u.
void kronecker_backward(const Kronecker& call, int64_t first, int64_t last, float* scratch, float* sums) {
    const int64_t l = call.l, r = call.r, d = l * r, batch = kronecker_batch(l, r);
    float *u = scratch, *rotated = u + batch * d, *transposed = rotated + batch * d;
    if (sums) memset(sums, 0, (l * l + r * r) * sizeof *sums);
    for (int64_t i = first; i < last; i += batch) {
        const int64_t count = last - i < batch ? last - i : batch;
        const float *x = call.x + i * d, *grad = call.grad + i * d;
        for (int64_t n = 0; n < count; ++n) multiply({call.left, grad + n * d, u + n * d, l, 1, l, r, false}, l);
        if (call.grad_x) multiply({u, call.right_t, call.grad_x + i * d, r, 1, r, r, false}, count * l);
        if (!sums) continue;
        multiply({x, call.right, rotated, r, 1, r, r, false}, count * l);
        for (int64_t n = 0; n < count; ++n) {
            transpose_matrix(grad + n * d, l, r, transposed);
            multiply({rotated + n * d, transposed, sums, r, 1, r, l, true}, l);
        }
        multiply({x, u, sums + l * l, 1, r, count * l, r, true}, r);
    }
}

}  // namespace
}  // namespace attar
