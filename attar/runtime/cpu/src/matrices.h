// Matrix registers (AMX): their shapes, and what compilers do not know of their instructions.
#pragma once

#include <immintrin.h>

#include "vectors.h"

namespace attar {
namespace {

constexpr int SIDE = 16;  // rows of a register, each of 64 bytes

struct alignas(64) Shapes {
    uint8_t palette = 1, first_row = 0, unused[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
};

const Shapes shapes;  // in memory: compilers do not know that the instruction reads all of it

INLINE void begin_matrices() { _tile_loadconfig(&shapes); }

INLINE void end_matrices() { _tile_release(); }

// What was stored before is in memory: compilers do not know what a register is loaded from.
INLINE void settle() { asm volatile("" ::: "memory"); }

// Registers 0 to 3: sums of (first, second) 16 rows by (first, second) 16 columns, of four bytes each, in memory whose
// rows are `stride` bytes apart. They start from what is there, or from zero.
INLINE void begin_sums(bool zero, const void* sums, int64_t stride) {
    const char *first = static_cast<const char*>(sums), *second = first + SIDE * stride;
    if (zero) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, first, stride);
        _tile_loadd(1, first + 4 * SIDE, stride);
        _tile_loadd(2, second, stride);
        _tile_loadd(3, second + 4 * SIDE, stride);
    }
}

INLINE void store_sums(void* sums, int64_t stride) {
    char *first = static_cast<char*>(sums), *second = first + SIDE * stride;
    _tile_stored(0, first, stride);
    _tile_stored(1, first + 4 * SIDE, stride);
    _tile_stored(2, second, stride);
    _tile_stored(3, second + 4 * SIDE, stride);
}

}  // namespace
}  // namespace attar
