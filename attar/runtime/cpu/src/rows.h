// Rows of activations: transforms, step size, integer codes, operation for operation those of reference.py.
#pragma once

#include "rotate.h"

namespace attar {
namespace {

// Integers in the order of the floats that they are the bits of; NaN lies beyond infinity.
INLINE Ints ordered(Ints bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

INLINE float from_ordered(int32_t i) { return bits_of<float>(i ^ ((i >> 31) & 0x7fffffff)); }

// A row of k numbers in one of the types; past its end it reads as zeros.
struct Row {
    const void* x;
    int32_t dtype;
    int64_t k;
    INLINE Floats at(int64_t i) const { return load_some(x, i, dtype, k - i); }
    // The same where a row is read for the first time: what comes is fetched beyond the page that processors look into.
    INLINE Floats first_at(int64_t i) const {
        __builtin_prefetch(static_cast<const char*>(x) + i * width(dtype) + FETCHED);
        return at(i);
    }
    static constexpr int64_t FETCHED = 4096;
};

// Largest magnitude of a row; NaN if it holds one.
float absmax_of(const Row& row) {
    Ints top = {};
    for (int64_t i = 0; i < row.k; i += LANES) {
        Ints magnitude = bits_of<Ints>(row.first_at(i)) & 0x7fffffff;
        top = larger(magnitude, top);
    }
    int32_t most = 0;
    for (int i = 0; i < LANES; ++i) most = top[i] > most ? top[i] : most;
    return bits_of<float>(most);
}

void minmax_of(const Row& row, float* low, float* high) {
    Ints bottom = Ints{} + ordered(bits_of<Ints>(row.at(0)))[0], top = bottom;
    const Ints some = bottom;
    for (int64_t i = 0; i < row.k; i += LANES) {
        Ints v = ordered(bits_of<Ints>(row.first_at(i)));
        if (row.k - i < LANES) v = chosen(lanes_below(row.k - i), v, some);  // no zeros that the row does not hold
        bottom = smaller(v, bottom);
        top = larger(v, top);
    }
    int32_t least = bottom[0], most = top[0];
    for (int i = 1; i < LANES; ++i) {
        least = bottom[i] < least ? bottom[i] : least;
        most = top[i] > most ? top[i] : most;
    }
    *low = from_ordered(least), *high = from_ordered(most);
}

// max(|low|, high), NaN if either is.
INLINE float magnitude_of(float low, float high) {
    const float below = __builtin_fabsf(low);
    return below > high || below != below ? below : high;
}

INLINE float largest_code(int bits) { return float((1 << (bits - 1)) - 1); }

constexpr float MIN_ABSMAX = 1e-5f;

INLINE float step_of(float absmax, int bits) { return (absmax < MIN_ABSMAX ? MIN_ABSMAX : absmax) / largest_code(bits); }

// Of a row in [low, high] whose farther end gets the smallest code, so that it is negative where that is `high`.
INLINE float signed_step_of(float low, float high, int bits) {
    const float most = largest_code(bits), below = -low;
    const bool lower = below > high || below != below;
    const float far = (lower ? below : high) / (most + 1), near = (below > high ? high : below) / most;
    float step = near > far ? near : far;
    step = step < MIN_ABSMAX / (most + 1) ? MIN_ABSMAX / (most + 1) : step;
    return high > below ? -step : step;
}

#if defined(__FMA__)
constexpr bool FUSED = true;  // multiply_add rounds once
#else
constexpr bool FUSED = false;
#endif

// v / step for many v, bit for bit where a code depends on it: a quotient that is faithful is made the nearest one by
// its remainder and the nearest inverse (Markstein 1990), which takes a fraction of the time of a division. Steps
// whose inverse is not a normal number are left to the division.
struct Divisor {
    Floats step, inverse;
    bool plain;
    INLINE explicit Divisor(float s)
        : step(Floats{} + s), inverse(Floats{} + 1.0f / s), plain(!FUSED || !(__builtin_fabsf(s) < 1e37f)) {}
    INLINE Floats under(Floats v) const {
        if (plain) return v / step;
        Floats q = v * inverse;
        q = multiply_add(multiply_add(-q, step, v), inverse, q);
        return multiply_add(multiply_add(-q, step, v), inverse, q);
    }
};

// v / step, and where there are inverses, faithful to the last bit without a division (`Divisor`).
INLINE Floats divided(Floats v, const Step& step, int64_t i, int64_t count) {
    const Floats by = load_some(step.a, i, FLOAT32, count);
    if (!FUSED || !step.b) return v / by;
    const Floats inverse = load_some(step.b, i, FLOAT32, count);
    Floats q = v * inverse;
    q = multiply_add(multiply_add(-q, by, v), inverse, q);
    return multiply_add(multiply_add(-q, by, v), inverse, q);
}

// A row -> x in float32, behind the first transforms that work on each number alone. Returns how many these are.
int load_row(const Linear& call, const Row& row, float* x) {
    int steps = 0;
    for (; steps < call.n_steps; ++steps)
        if (call.steps[steps].kind != CHANNEL_SCALE && call.steps[steps].kind != CHANNEL_SHIFT) break;
    for (int64_t i = 0; i < row.k; i += LANES) {
        Floats v = row.first_at(i);
        for (int s = 0; s < steps; ++s) {
            const Step& step = call.steps[s];
            v = step.kind == CHANNEL_SCALE ? divided(v, step, i, row.k - i)
                                           : v - load_some(step.a, i, FLOAT32, row.k - i);
        }
        store(x + i, v);
    }
    return steps;
}

// One row -> codes, zeros up to `padded`; x and other are room for `padded` floats each. RUN codes are neighbours, the
// next ones lie STRIDE bytes on; 0: all are neighbours.
template <int64_t RUN = 0, int64_t STRIDE = 0, class Rotate = RowRotation>
void quantize_row(const Linear& call, int64_t index, int64_t padded, float* x, float* other, int8_t* codes,
                  float* scale, int32_t* offset, const Rotate& rotate = Rotate()) {
    const auto place = [codes](int64_t i) { return codes + (RUN ? i / RUN * STRIDE + i % RUN : i); };
    const int64_t k = call.weight.k;
    Row row = {static_cast<const char*>(call.x) + index * k * width(call.x_dtype), call.x_dtype, k};
    if (call.n_steps) {
        transform(call, load_row(call, row, x), x, other, rotate);
        row.x = x, row.dtype = FLOAT32;
    }
    float low = -__builtin_inff(), high = __builtin_inff(), step;
    if (call.clip || call.full_range) {
        minmax_of(row, &low, &high);
        if (call.clip) low *= call.clip[0], high *= call.clip[1];
        step = call.full_range ? signed_step_of(low, high, call.act_bits) : step_of(magnitude_of(low, high), call.act_bits);
    } else {
        step = step_of(absmax_of(row), call.act_bits);
    }
    const float most = largest_code(call.act_bits), least = -most - 1;

    // Adding 1.5·2^23 rounds half to even and leaves the integer in the low bits; a NaN leaves zero there.
    const Floats lows = Floats{} + low, highs = Floats{} + high;
    const Floats leasts = Floats{} + least, mosts = Floats{} + most;
    const Divisor divisor(step);
    Ints sums = {};
    for (int64_t i = 0; i < k; i += LANES) {
        Floats v = row.at(i);
        v = smaller(highs, larger(lows, v));
        v = smaller(mosts, larger(leasts, divisor.under(v)));
        Ints code = bits_of<Ints>(v + 12582912.0f);
        if (k - i < LANES) code = chosen(lanes_below(k - i), code, Ints{});
        sums = sums + ((code << 24) >> 24);
        store(place(i), low_bytes(code));
    }
    for (int64_t i = (k + LANES - 1) / LANES * LANES; i < padded; i += LANES) store(place(i), Bytes{});
    int32_t sum = 0;
    for (int i = 0; i < LANES; ++i) sum += sums[i];
    *scale = step;
    *offset = -sum * (1 << (call.weight.bits - 1));
}

// `count` rows from `row` on -> the layout of Tile::x, in which ROWS rows lie interleaved: their values for one
// step of the product are neighbours, and the product reads a single stream.
template <int ROWS>
void quantize(const Linear& call, int64_t row, int64_t count, int64_t padded, void* scratch, int8_t* tile,
              float* scale, int32_t* offset) {
    static_assert(ROWS <= LANES, "a tile is transposed in one piece");
    float *x = static_cast<float*>(scratch), *other = x + padded;
    int8_t* codes = reinterpret_cast<int8_t*>(other + padded);
    for (int64_t r = 0; r < count; ++r)
        quantize_row(call, row + r, padded, x, other, codes + r * padded, scale + r, offset + r);
    for (int64_t k = 0; k < padded; k += 4 * LANES) {
#if defined(__AVX2__)
        if constexpr (ROWS == 4) {
            interleave(codes + k, padded, tile + k * ROWS);
            continue;
        }
#endif
        Ints rows[LANES] = {};
        for (int64_t r = 0; r < count; ++r) rows[r] = load<Ints>(codes + r * padded + k);
        transpose(rows);
        for (int step = 0; step < LANES; ++step) memcpy(tile + (k + 4 * step) * ROWS, &rows[step], ROWS * 4);
    }
}

}  // namespace
}  // namespace attar
