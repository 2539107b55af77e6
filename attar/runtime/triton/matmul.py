"""Products of activations with packed weights: integers (exact), float8, or weights that are dequantized on the way.

A program computes a tile of the transposed output, weights times activations: Hopper's tensor cores take their left
operand from registers, where unpacking leaves the weights, and the right one from shared memory, where the
activations arrive.
"""

import triton
import triton.language as tl

from attar.runtime.triton.codes import load_codes


@triton.jit
def tile_place(program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and first output of a program's tile; GROUP tiles of rows share the weights that the cache holds."""
    down, across = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = program // (GROUP * across) * GROUP
    size = tl.minimum(down - first, GROUP)
    within = program % (GROUP * across)
    return (first + within % size) * BLOCK_M, within // size * BLOCK_N


@triton.jit
def gelu_of(y, GELU: tl.constexpr):
    """GELU of float32 numbers: "none", that is with erf, or "tanh", where (1 + tanh z) / 2 = 1 / (1 + e^{-2z})."""
    if GELU == "tanh":
        return y / (1 + tl.exp(y * (y * y * -0.0713548163 - 1.59576912)))
    return y * (0.5 + 0.5 * tl.erf(y * 0.707106781))


@triton.jit
def store_outputs(y, bias_ptr, y_ptr, row, output, m, n, GELU: tl.constexpr = None):
    """y float32, plus bias, or GELU of it, into y_ptr (m, n) in its type. row and output: of y, one along each axis."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + output, mask=output < n, other=0.0).to(tl.float32)
    if GELU is not None:
        y = gelu_of(y, GELU)
    place = row.to(tl.int64) * n + output
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=(row < m) & (output < n))


@triton.jit
def scaled(total, step_ptr, scale_ptr, row, output, m, n):
    """Sums in float32 times the steps of rows and the scales of outputs, in the order of the reference."""
    y = total * tl.load(step_ptr + row, mask=row < m, other=0.0)
    return y * tl.load(scale_ptr + output, mask=output < n, other=0.0)


@triton.jit
def integer_matmul(
    x_ptr, step_ptr, codes_ptr, scale_ptr, bias_ptr, y_ptr, m, n, columns, plane_stride, row_bytes,
    BITS: tl.constexpr, PLANES: tl.constexpr, WHOLE: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x int8 (m, PLANES, plane_stride) · codes (n, row_bytes)ᵀ -> sum · step · scale + bias, then GELU, in y (m, n)."""
    first_row, first_output = tile_place(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    row = first_row + tl.arange(0, BLOCK_M)
    output = first_output + tl.arange(0, BLOCK_N)
    # Rows beyond the end repeat the last one, whose outputs are not stored twice.
    x_rows = x_ptr + tl.minimum(row, m - 1).to(tl.int64)[None, :] * (PLANES * plane_stride)
    w_rows = codes_ptr + tl.minimum(output, n - 1).to(tl.int64)[:, None] * row_bytes
    within = tl.arange(0, BLOCK_K)

    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for start in range(0, columns, BLOCK_K):
        column = start + within
        for plane in tl.static_range(PLANES):
            w = load_codes(w_rows, column[None, :], row_bytes, plane, PLANES, BITS, WHOLE)
            x = tl.load(x_rows + (plane * plane_stride + column)[:, None])
            total = tl.dot(w, x, total, out_dtype=tl.int32)  # older versions want the type said

    # The launch forbids fused multiply-add, which would round once less.
    row, output = row[None, :], output[:, None]
    y = scaled((total >> (8 - BITS)).to(tl.float32), step_ptr, scale_ptr, row, output, m, n)
    store_outputs(y, bias_ptr, y_ptr, row, output, m, n, GELU)


@triton.jit
def load_float8(rows, column, row_bytes, WHOLE: tl.constexpr):
    """Numbers of packed rows (n, 1) at columns (1, j): their bytes are the bit patterns. 0 beyond the row's end."""
    if WHOLE:
        return tl.load(rows + column).to(tl.float8e4nv, bitcast=True)
    return tl.load(rows + column, mask=column < row_bytes, other=0).to(tl.float8e4nv, bitcast=True)


@triton.jit
def float8_matmul(
    x_ptr, step_ptr, codes_ptr, scale_ptr, bias_ptr, y_ptr, m, n, columns, plane_stride, row_bytes,
    BITS: tl.constexpr, PLANES: tl.constexpr, WHOLE: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As integer_matmul, of bit patterns: x (m, 1, plane_stride) · codes (n, row_bytes)ᵀ -> y (m, n)."""
    first_row, first_output = tile_place(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    row = first_row + tl.arange(0, BLOCK_M)
    output = first_output + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + tl.minimum(row, m - 1).to(tl.int64)[None, :] * plane_stride
    w_rows = codes_ptr + tl.minimum(output, n - 1).to(tl.int64)[:, None] * row_bytes
    within = tl.arange(0, BLOCK_K)

    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, columns, BLOCK_K):
        column = start + within
        w = load_float8(w_rows, column[None, :], row_bytes, WHOLE)
        x = tl.load(x_rows + column[:, None]).to(tl.float8e4nv, bitcast=True)
        # Hopper adds such products in 14 bits; every 128 of them the sum is carried over to float32.
        total = tl.dot(w, x, total, max_num_imprecise_acc=128)

    row, output = row[None, :], output[:, None]
    y = scaled(total, step_ptr, scale_ptr, row, output, m, n)
    store_outputs(y, bias_ptr, y_ptr, row, output, m, n, GELU)


@triton.jit
def weight_only_matmul(
    x_ptr, codes_ptr, scale_ptr, bias_ptr, y_ptr, m, n, columns, plane_stride, row_bytes, groups, group_size,
    BITS: tl.constexpr, PLANES: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """x (m, PLANES, plane_stride) in floating point · (codes · scale)ᵀ + bias -> y (m, n), summed in float32.

    scale (n, groups). The dequantized weight is rounded to x's type, as the reference's is.
    """
    first_row, first_output = tile_place(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    row = first_row + tl.arange(0, BLOCK_M)
    output = first_output + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + tl.minimum(row, m - 1).to(tl.int64)[None, :] * (PLANES * plane_stride)
    some = tl.minimum(output, n - 1).to(tl.int64)[:, None]
    within = tl.arange(0, BLOCK_K)

    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, columns, BLOCK_K):
        column = start + within
        for plane in tl.static_range(PLANES):
            w_rows = codes_ptr + some * row_bytes
            if FP8:
                w = load_float8(w_rows, column[None, :], row_bytes, WHOLE).to(tl.float32)
            else:
                w = load_codes(w_rows, column[None, :], row_bytes, plane, PLANES, BITS, WHOLE)
                w = (w >> (8 - BITS)).to(tl.float32)
            group = tl.minimum((column * PLANES + plane) // group_size, groups - 1)[None, :]
            w = w * tl.load(scale_ptr + some * groups + group)
            x = tl.load(x_rows + (plane * plane_stride + column)[:, None])
            total = tl.dot(w.to(x.dtype), x, total, input_precision="ieee")
    store_outputs(total, bias_ptr, y_ptr, row[None, :], output[:, None], m, n)
