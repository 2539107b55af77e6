// Kronecker rotations with matrix registers.
//
// A float32 number is, to 2^-17 of it, the sum of two of bfloat16. Of the four products of such parts the three largest
// are added up, in float32: codes of 8 bits become other ones than with AVX-512 once in some thousands.
#pragma once

#include "matrices.h"
#include "memory.h"
#include "pieces.h"

namespace attar {
namespace {

constexpr int COARSE = 6;  // bits of codes up to which one part is enough
constexpr int64_t PAIRED = 32;  // bfloat16 numbers in a row of a register

// Matrices of bfloat16, the parts of one of float32: (1 or 2, rows, columns).
struct Parts {
    uint16_t* data;
    int64_t rows, columns;
    int64_t size() const { return rows * columns; }
};

// The factors of a rotation, as the products take them, and room for the parts of a row. Sides are rounded up to what
// registers hold, with zeros.
struct Rotation {
    int64_t l, r;
    int parts;
    Parts x, left, right, y;  // some rows of x and leftᵀ (l, l) by rows; right (r, r) and y (l, r) by pairs of rows
    float *product, *result;  // some rows of x by columns of right; (l, r) where that is no whole number of registers

    void prepare(const Step& step, int bits, Buffer& buffer);
    void rotate(float* numbers) const;
    template <int PARTS>
    void rotate_parts(const float* numbers, float* to) const;
};

// 32 numbers as bfloat16, and what that leaves of them.
INLINE __m512i take_part(__m512& low, __m512& high) {
    const __m512i part = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    const __m512i lower = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(part));
    const __m512i upper = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(part, 1));
    low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(lower, 16)));
    high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(upper, 16)));
    return part;
}

INLINE __mmask16 first_lanes(int64_t count) { return count >= LANES ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

// Rows of `count` numbers -> parts by rows.
template <int PARTS>
void split_rows(const float* from, int64_t rows, int64_t count, const Parts& to) {
    for (int64_t i = 0; i < rows; ++i, from += count)
        for (int64_t j = 0; j < to.columns; j += PAIRED) {
            __m512 low = _mm512_maskz_loadu_ps(first_lanes(count - j), from + j);
            __m512 high = _mm512_maskz_loadu_ps(first_lanes(count - j - LANES), from + j + LANES);
            uint16_t* at = to.data + i * to.columns + j;
            UNROLL for (int p = 0; p < PARTS; ++p) _mm512_storeu_si512(at + p * to.size(), take_part(low, high));
        }
}

// Rows (rows, stride), whose columns are `count` numbers, -> parts (rows / 2, columns, 2): the numbers of two rows in turns.
template <int PARTS>
void split_pairs(const float* from, int64_t rows, int64_t count, int64_t stride, const Parts& to) {
    alignas(64) uint16_t turns[PAIRED];
    for (int i = 0; i < PAIRED; ++i) turns[i] = uint16_t(i / 2 + i % 2 * LANES);
    const __m512i order = _mm512_load_si512(turns);
    for (int64_t i = 0; i < rows; i += 2)
        for (int64_t j = 0; j < count; j += LANES) {
            const __mmask16 there = first_lanes(count - j);
            __m512 even = _mm512_maskz_loadu_ps(there, from + i * stride + j);
            __m512 odd = _mm512_maskz_loadu_ps(i + 1 < rows ? there : 0, from + (i + 1) * stride + j);
            uint16_t* at = to.data + i * to.columns + 2 * j;
            UNROLL for (int p = 0; p < PARTS; ++p)
                _mm512_storeu_si512(at + p * to.size(), _mm512_permutexvar_epi16(order, take_part(even, odd)));
        }
}

// 16 or 32 rows by 16 or 32 columns of c = a · b. Registers 0 to 3: sums of (first, second) rows by (first, second)
// columns; 4, 5: rows; 6, 7: columns.
template <int PARTS, bool ROWS2, bool COLUMNS2>
INLINE void multiply_parts(const Parts& a, const Parts& b, int64_t row, int64_t column, float* c, int64_t stride) {
    const int64_t below = SIDE * a.columns, a_bytes = 2 * a.columns, b_bytes = 4 * b.columns;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const auto rows = [&](const uint16_t* at) {
        _tile_loadd(4, at, a_bytes);
        if (ROWS2) _tile_loadd(5, at + below, a_bytes);
    };
    const auto columns = [&](const uint16_t* at) {
        _tile_loadd(6, at, b_bytes);
        if (COLUMNS2) _tile_loadd(7, at + 2 * SIDE, b_bytes);
    };
    const auto add = [&] {
        _tile_dpbf16ps(0, 4, 6);
        if (COLUMNS2) _tile_dpbf16ps(1, 4, 7);
        if (ROWS2) _tile_dpbf16ps(2, 5, 6);
        if (ROWS2 && COLUMNS2) _tile_dpbf16ps(3, 5, 7);
    };
    for (int64_t k = 0; k < a.columns; k += PAIRED) {
        const uint16_t *high = a.data + row * a.columns + k;
        const uint16_t* other = b.data + k * b.columns + 2 * column;
        columns(other);
        if (PARTS == 2) rows(high + a.size()), add();
        rows(high), add();
        if (PARTS == 2) columns(other + b.size()), add();
    }
    float* to = c + row * stride + column;
    stride *= 4;
    _tile_stored(0, to, stride);
    if (COLUMNS2) _tile_stored(1, to + SIDE, stride);
    if (ROWS2) _tile_stored(2, to + SIDE * stride / 4, stride);
    if (ROWS2 && COLUMNS2) _tile_stored(3, to + SIDE * stride / 4 + SIDE, stride);
}

template <int PARTS>
void multiply_parts(const Parts& a, int64_t a_rows, const Parts& b, float* c) {
    settle();
    for (int64_t row = 0; row < a_rows; row += 2 * SIDE)
        for (int64_t column = 0; column < b.columns; column += 2 * SIDE) {
            const bool rows = row + SIDE < a_rows, columns = column + SIDE < b.columns;
            if (rows && columns)
                multiply_parts<PARTS, true, true>(a, b, row, column, c, b.columns);
            else if (rows)
                multiply_parts<PARTS, true, false>(a, b, row, column, c, b.columns);
            else if (columns)
                multiply_parts<PARTS, false, true>(a, b, row, column, c, b.columns);
            else
                multiply_parts<PARTS, false, false>(a, b, row, column, c, b.columns);
        }
    settle();
}

// Room in `buffer`, and the factors in it. `data` of x stays null where there is no memory.
void Rotation::prepare(const Step& step, int bits, Buffer& buffer) {
    l = step.rows, r = step.cols, parts = bits > COARSE ? 2 : 1;
    const int64_t l16 = round_up(l, SIDE), l32 = round_up(l, PAIRED), r16 = round_up(r, SIDE), r32 = round_up(r, PAIRED);
    x = {nullptr, 2 * SIDE, r32}, left = {nullptr, l16, l32}, right = {nullptr, r32, r16}, y = {nullptr, l32, r16};
    const int64_t numbers = parts * (x.size() + left.size() + right.size() + y.size());
    const int64_t bytes = 2 * numbers + (2 * SIDE * r16 + l16 * r16 + l * l) * 4;
    char* memory = static_cast<char*>(buffer.reserve(bytes));
    if (!memory) return;
    memset(memory, 0, bytes);
    product = reinterpret_cast<float*>(memory), result = product + 2 * SIDE * r16;
    x.data = reinterpret_cast<uint16_t*>(result + l16 * r16);
    left.data = x.data + parts * x.size();
    right.data = left.data + parts * left.size();
    y.data = right.data + parts * right.size();
    float* turned = reinterpret_cast<float*>(y.data + parts * y.size());
    for (int64_t i = 0; i < l; ++i)
        for (int64_t j = 0; j < l; ++j) turned[i * l + j] = step.a[j * l + i];
    if (parts == 1) {
        split_rows<1>(turned, l, l, left), split_pairs<1>(step.b, r, r, r, right);
    } else {
        split_rows<2>(turned, l, l, left), split_pairs<2>(step.b, r, r, r, right);
    }
}

template <int PARTS>
void Rotation::rotate_parts(const float* numbers, float* to) const {
    for (int64_t row = 0; row < l; row += 2 * SIDE) {  // what a few rows need stays in the L1 cache
        const int64_t rows = least(2 * SIDE, l - row);
        split_rows<PARTS>(numbers + row * r, rows, r, x);
        multiply_parts<PARTS>(x, round_up(rows, SIDE), right, product);
        Parts some = y;
        some.data += row * y.columns;
        split_pairs<PARTS>(product, rows, right.columns, right.columns, some);
    }
    multiply_parts<PARTS>(left, left.rows, y, to);
}

// numbers (l, r) -> leftᵀ · (numbers · right), in place.
void Rotation::rotate(float* numbers) const {
    const bool whole = l == left.rows && r == right.columns;  // registers
    float* to = whole ? numbers : result;
    if (parts == 1)
        rotate_parts<1>(numbers, to);
    else
        rotate_parts<2>(numbers, to);
    if (whole) return;
    for (int64_t i = 0; i < l; ++i) memcpy(numbers + i * r, result + i * right.columns, r * sizeof *numbers);
}

}  // namespace
}  // namespace attar
