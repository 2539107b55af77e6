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
def step_size(low, high, magnitude, clip_ptr, MOST: tl.constexpr):
    """The range [low, high] to clamp to and the step Δ of a row, from its extremes or its largest magnitude."""
    if clip_ptr is not None:
        low = low * tl.load(clip_ptr)
        high = high * tl.load(clip_ptr + 1)
        below = tl.abs(low)
        magnitude = tl.where((below > high) | (below != below), below, high)
    magnitude = tl.where(magnitude < 1e-5, 1e-5, magnitude)
    return low, high, tl.div_rn(magnitude, MOST)


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
def encode(x, low, high, step, MOST: tl.constexpr, CLIP: tl.constexpr, FP8: tl.constexpr):
    """float32 -> codes in int8."""
    if CLIP:
        x = tl.where(x < low, low, x)
        x = tl.where(x > high, high, x)
    x = tl.div_rn(x, step + tl.zeros_like(x))
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
def load_chunk(x_ptr, channel_ptr, place, width):
    """float32 values of a row at `place`, divided by the channel scales; 0 beyond the row's end."""
    inside = place < width
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if channel_ptr is not None:
        x = tl.div_rn(x, tl.load(channel_ptr + place, mask=inside, other=1.0))
    return x, inside


@triton.jit
def quantize_rows(
    x_ptr, channel_ptr, clip_ptr, codes_ptr, step_ptr, width, columns, x_stride, codes_stride,
    MOST: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One row for a program: x (m, width) -> codes int8 (m, PLANES, columns), zeros behind each plane, step (m,).

    The row is read twice, the second time from the cache: keeping it would bound its width by the registers.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    codes_ptr += row * codes_stride
    plane = tl.arange(0, PLANES)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    CLIP: tl.constexpr = clip_ptr is not None

    most = tl.full([PLANES, BLOCK], -0x80000000, tl.int32)
    least = tl.full([PLANES, BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(0, columns, BLOCK):
        x, inside = load_chunk(x_ptr, channel_ptr, (start + column) * PLANES + plane, width)
        bits = ordered(x if CLIP else tl.abs(x))
        most = tl.maximum(most, tl.where(inside, bits, -0x80000000))  # no zeros that the row does not hold
        if CLIP:
            least = tl.minimum(least, tl.where(inside, bits, 0x7FFFFFFF))
    high = unordered(tl.max(tl.max(most, 1), 0))
    low = unordered(tl.min(tl.min(least, 1), 0))
    low, high, step = step_size(low, high, high, clip_ptr, MOST)
    tl.store(step_ptr + row, step)

    for start in range(0, columns, BLOCK):
        x, inside = load_chunk(x_ptr, channel_ptr, (start + column) * PLANES + plane, width)
        codes = tl.where(inside, encode(x, low, high, step, MOST, CLIP, FP8), 0)
        place = start + column
        tl.store(codes_ptr + plane * columns + place, codes, mask=place < columns)
