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
def extremes(x, inside, CLIP: tl.constexpr):
    """Least and largest of the values inside as `ordered` bits, int32 tensors like x; without CLIP of magnitudes."""
    bits = ordered(x) if CLIP else tl.abs(x).to(tl.int32, bitcast=True)
    most = tl.where(inside, bits, -0x80000000)  # no zeros that the row does not hold
    return tl.where(inside, bits, 0x7FFFFFFF) if CLIP else most, most


@triton.jit
def step_size(least, most, clip_ptr, MOST: tl.constexpr):
    """The range [low, high] to clamp to, the step Δ of a row and 1/Δ, from its extremes as `ordered` bits."""
    low, high = unordered(least), unordered(most)
    magnitude = high
    if clip_ptr is not None:
        low = low * tl.load(clip_ptr)
        high = high * tl.load(clip_ptr + 1)
        below = tl.abs(low)
        magnitude = tl.where((below > high) | (below != below), below, high)
    magnitude = tl.where(magnitude < 1e-5, 1e-5, magnitude)
    step = tl.div_rn(magnitude, MOST)
    return low, high, step, tl.div_rn(1.0, step)


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
def encode(x, low, high, step, inverse, MOST: tl.constexpr, CLIP: tl.constexpr, FP8: tl.constexpr):
    """float32 -> codes in int8.

    x / Δ is rounded once, as a division is, but in three operations: the remainder of x · (1/Δ) is exact in a fused
    multiply-add, and what it is worth is added (Markstein, IBM J. Res. Dev. 34(1), 1990). A division in hardware is
    ten, and would take longer than the memory.
    """
    if CLIP:
        x = tl.where(x < low, low, x)
        x = tl.where(x > high, high, x)
    step, inverse = step + tl.zeros_like(x), inverse + tl.zeros_like(x)
    quotient = x * inverse
    x = tl.fma(tl.fma(-quotient, step, x), inverse, quotient)
    if FP8:  # NaN stays one
        x = tl.where(x < -MOST, -MOST * 1.0, x)
        x = tl.where(x > MOST, MOST * 1.0, x)
        return round_float8(x).to(tl.float8e4nv).to(tl.int8, bitcast=True)
    x = tl.where(x < -MOST - 1, -MOST - 1.0, x)
    x = tl.where(x > MOST, MOST * 1.0, x)
    x = tl.where(x == x, x, 0.0)
    # Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits, without a library call.
    return (x + _HALF_EVEN).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def load_chunk(x_ptr, channel_ptr, place, inside):
    """float32 values of a row at `place`, divided by the channel scales; 0 where it is not inside."""
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if channel_ptr is not None:
        x = tl.div_rn(x, tl.load(channel_ptr + place, mask=inside, other=1.0))
    return x


@triton.jit
def quantize_rows(
    x_ptr, channel_ptr, clip_ptr, codes_ptr, step_ptr, width, columns, x_stride, codes_stride,
    MOST: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One row for a program: x (m, width) -> codes int8 (m, PLANES, columns), zeros behind each plane, step (m,).

    WHOLE: BLOCK columns hold the row, which stays in registers. A longer one is read twice, the second time from the
    cache: keeping it would bound its width by the registers.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    codes_ptr += row * codes_stride
    plane = tl.arange(0, PLANES)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    CLIP: tl.constexpr = clip_ptr is not None
    if WHOLE:
        place = column * PLANES + plane
        inside = place < width
        x = load_chunk(x_ptr, channel_ptr, place, inside)
        least, most = extremes(x, inside, CLIP)
        low, high, step, inverse = step_size(
            tl.min(tl.min(least, 1), 0), tl.max(tl.max(most, 1), 0), clip_ptr, MOST
        )
        codes = tl.where(inside, encode(x, low, high, step, inverse, MOST, CLIP, FP8), 0)
        tl.store(codes_ptr + plane * columns + column, codes, mask=column < columns)
    else:
        most = tl.full([PLANES, BLOCK], -0x80000000, tl.int32)
        least = tl.full([PLANES, BLOCK], 0x7FFFFFFF, tl.int32)
        for start in range(0, columns, BLOCK):
            place = (start + column) * PLANES + plane
            inside = place < width
            x = load_chunk(x_ptr, channel_ptr, place, inside)
            below, above = extremes(x, inside, CLIP)
            most = tl.maximum(most, above)
            if CLIP:
                least = tl.minimum(least, below)
        low, high, step, inverse = step_size(
            tl.min(tl.min(least, 1), 0), tl.max(tl.max(most, 1), 0), clip_ptr, MOST
        )
        for start in range(0, columns, BLOCK):
            place = (start + column) * PLANES + plane
            inside = place < width
            x = load_chunk(x_ptr, channel_ptr, place, inside)
            codes = tl.where(inside, encode(x, low, high, step, inverse, MOST, CLIP, FP8), 0)
            tl.store(codes_ptr + plane * columns + start + column, codes, mask=start + column < columns)
    tl.store(step_ptr + row, step)
