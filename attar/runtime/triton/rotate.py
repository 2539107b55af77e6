"""Rows of activations -> Hadamard rotation -> integer codes and step sizes, in one launch."""

import triton
import triton.language as tl

from attar.runtime.triton.quantize import encode, load_chunk, ordered, step_size, unordered


@triton.jit
def butterfly(x, STRIDE: tl.constexpr, L: tl.constexpr, R: tl.constexpr):
    """x (L, R): sums and differences of the numbers that lie STRIDE apart in a row."""
    pairs = tl.permute(tl.reshape(x, [L * R // (2 * STRIDE), 2, STRIDE]), [0, 2, 1])
    u, v = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(u + v, u - v), [0, 2, 1]), [L, R])


@triton.jit
def quantize_rotated_rows(
    x_ptr, channel_ptr, signs_ptr, base_ptr, clip_ptr, codes_ptr, step_ptr, width, columns, x_stride, codes_stride,
    norm, ORDER: tl.constexpr, MOST: tl.constexpr, PLANES: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    LOG_R: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One row for a program: x (m, ORDER · R), as transforms.Hadamard of one block turns it, -> as quantize_rows.

    R = 2^LOG_R; a row is held as (L, R), where L is ORDER raised to a power of two that tensor cores take.
    """
    row = tl.program_id(0).to(tl.int64)
    codes_ptr += row * codes_stride
    down, across = tl.arange(0, L)[:, None], tl.arange(0, R)[None, :]
    place = down * R + across
    x, inside = load_chunk(x_ptr + row * x_stride, channel_ptr, place, width)
    x = x * tl.load(signs_ptr + place, mask=inside, other=0).to(tl.float32)
    for power in tl.static_range(LOG_R):
        x = butterfly(x, 2**power, L, R)
    if ORDER > 1:
        to = tl.arange(0, L)[None, :]
        base = tl.load(base_ptr + down * ORDER + to, mask=(down < ORDER) & (to < ORDER), other=0).to(
            tl.float32
        )
        x = tl.dot(base, x, input_precision="tf32x3")  # nearly float32: ±1 is exact, x is split in three
    x = x * norm

    bits = ordered(x if clip_ptr is not None else tl.abs(x))
    high = unordered(tl.max(tl.max(tl.where(inside, bits, -0x80000000), 1), 0))
    low = unordered(tl.min(tl.min(tl.where(inside, bits, 0x7FFFFFFF), 1), 0))
    low, high, step = step_size(low, high, high, clip_ptr, MOST)
    tl.store(step_ptr + row, step)

    codes = encode(x, low, high, step, MOST, clip_ptr is not None, FP8)
    codes = tl.permute(tl.reshape(codes, [L, R // PLANES, PLANES]), [2, 0, 1])
    plane = tl.arange(0, PLANES)[:, None, None]
    down, across = tl.arange(0, L)[None, :, None], tl.arange(0, R // PLANES)[None, None, :]
    place = plane * columns + down * (R // PLANES) + across
    tl.store(codes_ptr + place, codes, mask=down < ORDER)
    tail = width // PLANES + tl.arange(0, BLOCK)[None, :]  # zeros behind each plane
    nothing = tl.zeros([PLANES, BLOCK], tl.int8)
    tl.store(codes_ptr + tl.arange(0, PLANES)[:, None] * columns + tail, nothing, mask=tail < columns)
