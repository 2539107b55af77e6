// The integer matrix product: ROWS x (VECTORS · WIDTH) sums in registers over a range of the depth.
//
// `Isa` gives: Vector, a register of sums, and its zero(); WIDTH, sums in it; VECTORS, registers of a strip; ROWS, the largest
// tile; Weights and Values, the operands of dot(), which adds to each sum the product of four unsigned weights and
// four signed values. Where NARROW, narrow_dot() does so in 16 bits, two products in each, and widen() adds these to sums;
// dot() takes values of two bytes then, which as_halves() makes.
#pragma once

#include "finish.h"
#include "learning.h"
#include "rows.h"
#include "weights.h"

namespace attar {
namespace {

constexpr int64_t AHEAD = 1024;  // bytes of the strip that are fetched before they are needed
template <class Isa, int ROWS>
INLINE void accumulate(const Tile& t, int32_t* out) {
    constexpr int STRIP = Isa::WIDTH * Isa::VECTORS;
    typename Isa::Vector sums[ROWS][Isa::VECTORS];
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int v = 0; v < Isa::VECTORS; ++v)
            sums[r][v] = t.begin ? Isa::zero() : Isa::load_sums(out + r * STRIP + v * Isa::WIDTH);

    const int8_t* x = t.x;
    const uint8_t* strip = t.strip;
    constexpr int VALUES = Isa::NARROW ? 8 : 4;  // bytes of a row's
    for (int64_t step = 0; step < t.depth; ++step, x += VALUES * Isa::ROWS, strip += STRIP * 4) {
        typename Isa::Weights weights[Isa::VECTORS];
        UNROLL for (int v = 0; v < Isa::VECTORS; ++v) weights[v] = Isa::load_weights(strip + v * Isa::WIDTH * 4);
        UNROLL for (int i = 0; i < STRIP * 4; i += 64) __builtin_prefetch(strip + i + AHEAD);
        UNROLL for (int r = 0; r < ROWS; ++r) {
            typename Isa::Values values = Isa::broadcast(x + VALUES * r);
            UNROLL for (int v = 0; v < Isa::VECTORS; ++v) sums[r][v] = Isa::dot(sums[r][v], weights[v], values);
        }
    }
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int v = 0; v < Isa::VECTORS; ++v)
            Isa::store_sums(out + r * STRIP + v * Isa::WIDTH, sums[r][v]);
}

// The same in parts of t.narrow steps, each summed up in half as many bits.
template <class Isa, int ROWS>
INLINE void accumulate_narrow(const Tile& t, int32_t* out) {
    constexpr int STRIP = Isa::WIDTH * Isa::VECTORS;
    const int8_t* x = t.x;
    const uint8_t* strip = t.strip;
    for (int64_t step = 0; step < t.depth; step += t.narrow) {
        const bool begin = t.begin && !step;
        typename Isa::Vector sums[ROWS][Isa::VECTORS];
        UNROLL for (int r = 0; r < ROWS; ++r)
            UNROLL for (int v = 0; v < Isa::VECTORS; ++v) sums[r][v] = Isa::zero();
        for (int64_t left = least(t.narrow, t.depth - step); left > 0; --left, x += 4 * Isa::ROWS, strip += STRIP * 4) {
            UNROLL for (int i = 0; i < STRIP * 4; i += 64) __builtin_prefetch(strip + i + AHEAD);
            UNROLL for (int r = 0; r < ROWS; ++r)
                UNROLL for (int v = 0; v < Isa::VECTORS; ++v)
                    sums[r][v] = Isa::narrow_dot(sums[r][v], strip + v * Isa::WIDTH * 4, x + 4 * r);
        }
        UNROLL for (int r = 0; r < ROWS; ++r)
            UNROLL for (int v = 0; v < Isa::VECTORS; ++v) {
                int32_t* place = out + r * STRIP + v * Isa::WIDTH;
                Isa::store_sums(place, Isa::widen(begin ? Isa::zero() : Isa::load_sums(place), sums[r][v]));
            }
    }
}

template <class Isa, int ROWS>
void tile_of(const Tile& t) {
    constexpr int STRIP = Isa::WIDTH * Isa::VECTORS;
    alignas(64) int32_t own[ROWS * STRIP];
    int32_t* sums = t.sums ? t.sums : own;
    if constexpr (Isa::NARROW) {
        if (t.narrow)
            accumulate_narrow<Isa, ROWS>(t, sums);
        else
            accumulate<Isa, ROWS>(t, sums);
    } else {
        accumulate<Isa, ROWS>(t, sums);
    }
    if (!t.end) return;
    alignas(64) float added[(ROWS + BRANCH_ROWS - 1) / BRANCH_ROWS * BRANCH_ROWS * STRIP];
    Tile done = t;
    if (t.branch.rank) multiply_rows<STRIP>(t.branch, ROWS, added), done.added = added;
    for (int r = 0; r < ROWS; ++r) finish_row<STRIP>(done, r, sums);
}

template <class Isa, int ROWS>
struct Dispatch {
    static void call(int rows, const Tile& t) {
        if (rows == ROWS)
            tile_of<Isa, ROWS>(t);
        else
            Dispatch<Isa, ROWS - 1>::call(rows, t);
    }
};

template <class Isa>
struct Dispatch<Isa, 0> {
    static void call(int, const Tile&) {}
};

template <class Isa>
constexpr auto halves_of() {
    if constexpr (Isa::NARROW)
        return Isa::as_halves;
    else
        return nullptr;
}

template <class Isa>
constexpr Kernels kernels_of(const char* name) {
    return {name,
            Isa::WIDTH * Isa::VECTORS,
            Isa::ROWS,
            0,
            256 << 10,
            nullptr,
            nullptr,
            quantize<Isa::ROWS>,
            unpack<Isa::WIDTH * Isa::VECTORS>,
            Dispatch<Isa, Isa::ROWS>::call,
            halves_of<Isa>(),
            dequantize,
            fake_quantize,
            fake_quantize_backward,
            kronecker,
            kronecker_backward,
            cayley,
            cayley_backward};
}

}  // namespace
}  // namespace attar
