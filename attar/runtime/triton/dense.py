"""Products for many rows: weights are unpacked into bytes once a call, then both factors arrive by bulk copies.

Unpacking takes n·k bytes for as long as the call lasts and, beside the product with thousands of rows, next to no time;
the product then has nothing to do but multiply. It needs the copy engine of Hopper and later (compute capability 9.0).
"""

import triton
import triton.language as tl

from attar.runtime.triton.matmul import load_float8, scaled, store_outputs, tile_place


@triton.jit
def unpack_rows(
    codes_ptr, scale_ptr, w_ptr, width, row_bytes, w_stride, groups, group_size,
    BITS: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Packed codes (n, row_bytes) -> w (n, width): their numbers, or these times scales (n, groups), in w's type."""
    pieces = tl.cdiv(width, BLOCK)
    row, piece = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces
    codes_ptr += row * row_bytes
    column = piece * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if FP8:
        number = load_float8(codes_ptr, column, row_bytes, False).to(tl.float32)
    elif BITS == 4:
        half = piece * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        both = tl.load(codes_ptr + half, mask=half < row_bytes, other=0)
        number = tl.interleave(both & 15, both >> 4).to(tl.int8) - 8
    elif BITS == 8:
        number = (tl.load(codes_ptr + column, mask=inside, other=0) ^ 128).to(tl.int8, bitcast=True)
    else:
        byte, shift = column * BITS // 8, column * BITS % 8
        code = tl.load(codes_ptr + byte, mask=inside, other=0).to(tl.int32)
        if 8 % BITS != 0:  # a code may go on in the next byte
            code |= (
                tl.load(codes_ptr + byte + 1, mask=inside & (byte + 1 < row_bytes), other=0).to(tl.int32) << 8
            )
        number = ((code >> shift) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row * groups + column // group_size, mask=inside, other=0.0)
        number = number.to(tl.float32) * scale
    tl.store(w_ptr + row * w_stride + column, number.to(w_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dense_matmul(
    x, w, step_ptr, scale_ptr, bias_ptr, y_ptr, m, n, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, GELU: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """x int8 (m, width) · w int8 (n, width)ᵀ, descriptors both -> sum · step · scale + bias, then GELU, in y (m, n).

    As many programs as the device has multiprocessors; each takes one tile after another. FLATTEN: the two loops are
    one, so that the loads of the next tile are under way while this one's outputs are computed.
    """
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        first_row, first_output = tile_place(tile, m, n, BLOCK_M, BLOCK_N, GROUP)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for start in range(0, width, BLOCK_K):
            a = x.load([first_row, start])
            b = w.load([first_output, start])
            total = tl.dot(a, b.T, total, out_dtype=tl.int32)
        row = (first_row + tl.arange(0, BLOCK_M))[:, None]
        output = (first_output + tl.arange(0, BLOCK_N))[None, :]
        y = scaled(total.to(tl.float32), step_ptr, scale_ptr, row, output, m, n)
        store_outputs(y, bias_ptr, y_ptr, row, output, m, n, GELU)
