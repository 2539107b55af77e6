"""Rows of activations -> codes and step sizes, operation for operation those of reference.py, in one launch.

Codes are integers, or with FP8 the bit patterns of float8 numbers (e4m3), in bytes of the same type.
"""

import triton
import triton.language as tl

_HALF_EVEN: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23


@triton.jit
def ordered(x):
    """float32 -> int32 in the same order with NaN beyond infinity; bits back through the same function.

    Maxima of floats drop a NaN; those of integers keep it, so a row that holds one ends as NaN.
    """
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def extremes(x, inside, ENDS: tl.constexpr, FULL: tl.constexpr = False):
    """Least and largest of the values inside as `ordered` bits, int32 tensors like x; without ENDS of magnitudes.

    FULL: all are inside.
    """
    bits = ordered(x) if ENDS else tl.abs(x).to(tl.int32, bitcast=True)
    if FULL:
        return bits, bits
    most = tl.where(inside, bits, -0x80000000)  # no zeros that the row does not hold
    return tl.where(inside, bits, 0x7FFFFFFF) if ENDS else most, most


@triton.jit
def in_range(quotient, MOST: tl.constexpr):
    return tl.minimum(tl.maximum(quotient, -MOST - 1.0), MOST * 1.0)


@triton.jit
def step_size(least, most, clip_ptr, MOST: tl.constexpr, SIGNED: tl.constexpr):
    """The step Δ of a row, 1/Δ, and the least and largest quotient, from its extremes as `ordered` bits.

    SIGNED: the farther end is the smallest code, and Δ negative where that is the upper one. A row that is not finite
    gets NaN for Δ, which is what its outputs are; its codes mean nothing.
    """
    low, high = unordered(least), unordered(most)
    magnitude = high
    if clip_ptr is not None:
        low = low * tl.load(clip_ptr)
        high = high * tl.load(clip_ptr + 1)
        below = tl.abs(low)
        magnitude = tl.where((below > high) | (below != below), below, high)
    if SIGNED:
        below = -low
        far = tl.where((below > high) | (below != below), below, high) * (1.0 / (MOST + 1.0))
        near = tl.div_rn(tl.where(below > high, high, below), MOST)
        step = tl.where(near > far, near, far)
        step = tl.where(step < 1e-5 / (MOST + 1.0), 1e-5 / (MOST + 1.0), step)
    else:
        step = tl.div_rn(tl.where(magnitude < 1e-5, 1e-5, magnitude), MOST)
    step = tl.where(step < float("inf"), step, float("nan"))
    if SIGNED:
        step = tl.where(high > -low, -step, step)
    # Rounding a quotient keeps the order, so that clamping it is clamping what is divided.
    low, high = tl.div_rn(low, step), tl.div_rn(high, step)
    if SIGNED:
        low, high = tl.minimum(low, high), tl.maximum(low, high)
    return step, tl.div_rn(1.0, step), in_range(low, MOST), in_range(high, MOST)


@triton.jit
def round_float8(x):
    """float32 up to 448 -> the nearest number of e4m3, half to even, still in float32.

    Older versions of Triton convert by way of float16 where the GPU has no instruction, which rounds twice.
    """
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    spacing = tl.where(power > 0.015625, power, 0.015625) * 0.125  # below 2^-6 numbers lie 2^-9 apart
    spacing = tl.where(x == x, spacing, x)
    magic = spacing * _HALF_EVEN
    return (x + magic) - magic


@triton.jit
def encode(x, step, inverse, low, high, CLIP: tl.constexpr, FP8: tl.constexpr):
    """float32 -> codes in int8, of what `step_size` gave for the row.

    x / Δ is rounded once, as a division is, but in three operations: the remainder of x · (1/Δ) is exact in a fused
    multiply-add, and what it is worth is added (Markstein, IBM J. Res. Dev. 34(1), 1990). A division in hardware is
    ten, and would take longer than the memory. Without CLIP no quotient is out of range by more than its rounding.
    """
    step, inverse = step + tl.zeros_like(x), inverse + tl.zeros_like(x)
    quotient = x * inverse
    if CLIP:  # a row may be clipped to a range far below its numbers: the remainder of infinity would be none
        quotient = tl.minimum(tl.maximum(quotient, -1e38), 1e38)
    quotient = tl.fma(tl.fma(-quotient, step, x), inverse, quotient)
    if CLIP:
        quotient = tl.minimum(tl.maximum(quotient, low), high)
    if FP8:
        return round_float8(quotient).to(tl.float8e4nv).to(tl.int8, bitcast=True)
    # Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits, without a library call.
    return (quotient + _HALF_EVEN).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def load_chunk(x_ptr, shift_ptr, channel_ptr, place, inside, FULL: tl.constexpr = False):
    """float32 values of a row at `place`, shifted, divided by the channel scales; 0 where not inside (FULL: all is)."""
    if FULL:
        x = tl.load(x_ptr + place).to(tl.float32)
        if shift_ptr is not None:
            x = x - tl.load(shift_ptr + place)
        if channel_ptr is not None:
            x = tl.div_rn(x, tl.load(channel_ptr + place))
    else:
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if shift_ptr is not None:
            x = x - tl.load(shift_ptr + place, mask=inside, other=0.0)
        if channel_ptr is not None:
            x = tl.div_rn(x, tl.load(channel_ptr + place, mask=inside, other=1.0))
    return x


@triton.jit
def load_piece(
    x_ptr, shift_ptr, channel_ptr, start, width, PLANES: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr
):
    """Columns [start, start + SIZE) of all planes of a row, float32 (PLANES, SIZE), and which lie inside the row."""
    place = (start + tl.arange(0, SIZE)[None, :]) * PLANES + tl.arange(0, PLANES)[:, None]
    inside = place < width
    return load_chunk(x_ptr, shift_ptr, channel_ptr, place, inside, FULL), inside


@triton.jit
def store_piece(
    codes, inside, codes_ptr, start, columns, PLANES: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr
):
    """Codes of such a piece, zeros beyond the row, up to `columns` of each plane."""
    column = start + tl.arange(0, SIZE)[None, :]
    to = codes_ptr + tl.arange(0, PLANES)[:, None] * columns + column
    if FULL:
        tl.store(to, codes)
    else:
        tl.store(to, tl.where(inside, codes, 0), mask=column < columns)


@triton.jit
def over_row(least, most):
    """The extremes of a whole row from those of its places."""
    return tl.min(tl.min(least, 1), 0), tl.max(tl.max(most, 1), 0)


@triton.jit
def quantize_rows(
    x_ptr, shift_ptr, channel_ptr, clip_ptr, codes_ptr, step_ptr, width, columns, x_stride, codes_stride,
    MOST: tl.constexpr, PLANES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, FULL: tl.constexpr,
    FP8: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """One row for a program: x (m, width) -> codes int8 (m, PLANES, columns), zeros behind each plane, step (m,).

    FIRST and SECOND are powers of two, or SECOND is 0. Together they hold the columns, and the row stays in registers;
    FULL: of how many of these two pieces the row fills every place. A longer row comes in pieces of FIRST, and is read
    twice, the second time from the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    codes_ptr += row * codes_stride
    CLIP: tl.constexpr = clip_ptr is not None
    ENDS: tl.constexpr = CLIP or SIGNED
    if SECOND > 0:
        x, inside = load_piece(x_ptr, shift_ptr, channel_ptr, 0, width, PLANES, FIRST, FULL > 0)
        z, within = load_piece(x_ptr, shift_ptr, channel_ptr, FIRST, width, PLANES, SECOND, FULL > 1)
        least, most = over_row(*extremes(x, inside, ENDS, FULL > 0))
        below, above = over_row(*extremes(z, within, ENDS, FULL > 1))
        step, inverse, low, high = step_size(
            tl.minimum(least, below), tl.maximum(most, above), clip_ptr, MOST, SIGNED
        )
        codes = encode(x, step, inverse, low, high, CLIP, FP8)
        store_piece(codes, inside, codes_ptr, 0, columns, PLANES, FIRST, FULL > 0)
        codes = encode(z, step, inverse, low, high, CLIP, FP8)
        store_piece(codes, within, codes_ptr, FIRST, columns, PLANES, SECOND, FULL > 1)
    else:
        most = tl.full([PLANES, FIRST], -0x80000000, tl.int32)
        least = tl.full([PLANES, FIRST], 0x7FFFFFFF, tl.int32)
        for start in range(0, columns, FIRST):
            x, inside = load_piece(x_ptr, shift_ptr, channel_ptr, start, width, PLANES, FIRST, False)
            below, above = extremes(x, inside, ENDS)
            most = tl.maximum(most, above)
            if ENDS:
                least = tl.minimum(least, below)
        least, most = over_row(least, most)
        step, inverse, low, high = step_size(least, most, clip_ptr, MOST, SIGNED)
        for start in range(0, columns, FIRST):
            x, inside = load_piece(x_ptr, shift_ptr, channel_ptr, start, width, PLANES, FIRST, False)
            codes = encode(x, step, inverse, low, high, CLIP, FP8)
            store_piece(codes, inside, codes_ptr, start, columns, PLANES, FIRST, False)
    tl.store(step_ptr + row, step)
