"""Rows of activations -> rotation -> codes and step sizes, in one launch.

A rotation by a Kronecker product left ⊗ right turns a row, written as a matrix X (LEFT, RIGHT), into leftᵀ X right: two
small products on the tensor cores. A Hadamard matrix is such a product too, its factors are made of signs.
"""

import triton
import triton.language as tl

from attar.runtime.triton.quantize import encode, extremes, load_chunk, over_row, step_size


@triton.jit
def hadamard_factor(base_ptr, ORDER: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """base (ORDER, ORDER) ⊗ Sylvester's matrix, (PADDED, PADDED) with zeros beyond SIZE."""
    row, column = tl.arange(0, PADDED)[:, None], tl.arange(0, PADDED)[None, :]
    WIDTH: tl.constexpr = SIZE // ORDER
    bits = (row % WIDTH) & (column % WIDTH)  # an odd number of bits in common is -1
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    sign = 1.0 - 2.0 * (bits & 1).to(tl.float32)
    inside = (row < SIZE) & (column < SIZE)
    if ORDER > 1:
        place = row // WIDTH * ORDER + column // WIDTH
        sign = sign * tl.load(base_ptr + place, mask=inside, other=0).to(tl.float32)
    return tl.where(inside, sign, 0.0)


@triton.jit
def matrix_factor(pointer, down, across, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """A matrix (SIZE, SIZE) whose rows and columns lie `down` and `across` apart, with zeros around it."""
    row, column = tl.arange(0, PADDED)[:, None], tl.arange(0, PADDED)[None, :]
    place = row * down + column * across
    return tl.load(pointer + place, mask=(row < SIZE) & (column < SIZE), other=0.0)


@triton.jit
def normalized(x):
    """x (a, b) / p in float16, below 4 in magnitude, and the power of two p, float32. All NaN where x is not finite."""
    most = tl.max(tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1), 0)
    power = tl.minimum(most & 0x7F800000, 0x7E800000)
    inverse = (0x7F000000 - power).to(tl.float32, bitcast=True)
    inverse = tl.where(most < 0x7F800000, inverse, float("nan"))
    return (x * inverse).to(tl.float16), power.to(tl.float32, bitcast=True)


@triton.jit
def quantize_rotated_rows(
    x_ptr, shift_ptr, channel_ptr, signs_ptr, left_ptr, right_ptr, clip_ptr, codes_ptr, step_ptr, m, columns,
    x_stride, codes_stride, norm, ORDER: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, L: tl.constexpr,
    R: tl.constexpr, HALF: tl.constexpr, MOST: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
    FP8: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """x (m, LEFT · RIGHT), as transforms.Hadamard or Kronecker turns it, -> as quantize_rows.

    ORDER: of the base of a Hadamard rotation, which left_ptr has then; 0 for a Kronecker product. A row is held as
    (L, R), powers of two. HALF: row and factors are divided by powers of two and rounded to float16, whose 11 bits are
    no fewer than those of a row in half precision; sums are float32. Else products are nearly those of float32.
    """
    down, across = tl.arange(0, L)[:, None], tl.arange(0, R)[None, :]
    place = down * RIGHT + across
    inside = (down < LEFT) & (across < RIGHT)
    CLIP: tl.constexpr = clip_ptr is not None
    ENDS: tl.constexpr = CLIP or SIGNED
    if ORDER > 0:
        left = hadamard_factor(left_ptr, ORDER, LEFT, L)
        right = hadamard_factor(left_ptr, 1, RIGHT, R)
        scale = norm
        if HALF:
            left, right = left.to(tl.float16), right.to(tl.float16)
    else:
        left = matrix_factor(left_ptr, 1, LEFT, LEFT, L)  # transposed
        right = matrix_factor(right_ptr, RIGHT, 1, RIGHT, R)
        scale = norm
        if HALF:
            left, left_power = normalized(left)
            right, right_power = normalized(right)
            scale = left_power * right_power

    for row in range(tl.program_id(0), m, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        x = load_chunk(x_ptr + at * x_stride, shift_ptr, channel_ptr, place, inside)
        if signs_ptr is not None:
            x = x * tl.load(signs_ptr + place, mask=inside, other=0).to(tl.float32)
        if HALF:
            x, power = normalized(x)
            x = tl.dot(left, tl.dot(x, right).to(tl.float16)) * (power * scale)
        else:  # tf32x3: nearly float32
            x = tl.dot(left, tl.dot(x, right, input_precision="tf32x3"), input_precision="tf32x3") * scale

        least, most = over_row(*extremes(x, inside, ENDS))
        step, inverse, low, high = step_size(least, most, clip_ptr, MOST, SIGNED)
        tl.store(step_ptr + at, step)
        codes = encode(x, step, inverse, low, high, CLIP, FP8)
        to = codes_ptr + at * codes_stride
        tl.store(to + place % PLANES * columns + place // PLANES, codes, mask=inside)
        plane = tl.arange(0, PLANES)[:, None]
        tail = LEFT * RIGHT // PLANES + tl.arange(0, BLOCK)[None, :]  # zeros behind each plane
        behind = (tail < columns) & (tail * PLANES + plane >= LEFT * RIGHT)
        tl.store(to + plane * columns + tail, tl.zeros([PLANES, BLOCK], tl.int8), mask=behind)
