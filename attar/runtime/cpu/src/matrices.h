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

}  // namespace
}  // namespace attar
