"""Products with packed weights: which kernel runs, and with what tile.

With few rows, weights are unpacked on their way to the tensor cores. With many, they are unpacked into bytes first, for
as long as the call lasts, where the GPU has the copy engine that makes the rest fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from attar.runtime.triton.activations import EXACT, float32
from attar.runtime.triton.available import copies_tiles, processors
from attar.runtime.triton.codes import BLOCK, padded_columns, planes
from attar.runtime.triton.codes import columns as columns_of
from attar.runtime.triton.dense import dense_matmul, unpack_rows
from attar.runtime.triton.matmul import float8_matmul, integer_matmul, weight_only_matmul
from attar.runtime.triton.tune import Config, Problem, bucket, choose

_UNPACKED = 2048  # numbers that a program unpacks
MANY_ROWS = 1024  # from here on unpacking weights takes little beside the product
# The first tile that a number of rows allows is taken where nothing may be measured, so it has to fit every GPU.
INTEGER = (
    Config(128, 128, 256, 8, 3),
    Config(128, 128, 128, 4, 4),
    Config(128, 256, 128, 8, 3),
    Config(256, 128, 128, 8, 3),
    Config(256, 128, 256, 8, 3),
    Config(64, 128, 256, 4, 3),
    Config(64, 64, 128, 4, 4),
    Config(32, 64, 256, 4, 4),
    Config(16, 64, 256, 4, 4),
)
DENSE = (
    Config(128, 256, 128, 8, 4),
    Config(256, 128, 128, 8, 4),
    Config(256, 128, 128, 8, 4, flatten=1),
    Config(128, 256, 128, 8, 4, flatten=1),
    Config(128, 256, 128, 8, 3, flatten=1),
    Config(128, 256, 128, 8, 3, group=16, flatten=1),
    Config(128, 256, 128, 8, 3, group=2, flatten=1),
    Config(256, 128, 128, 8, 3, flatten=1),
)
FLOATING = (
    Config(64, 64, 64, 4, 2),
    Config(128, 64, 64, 4, 3),
    Config(128, 128, 64, 8, 2),
    Config(128, 128, 64, 8, 3),
    Config(32, 64, 64, 4, 2),
    Config(16, 64, 64, 4, 2),
    Config(16, 32, 128, 4, 3),
)


def unpacks_first(rows: int, number: str, device: torch.device) -> bool:
    """Whether a product of so many rows unpacks its weights into bytes before."""
    return number == "int" and rows >= MANY_ROWS and copies_tiles(device)


def packed_product(
    x: Tensor, step: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, width: int, bits: int, y: Tensor,
    gelu: str | None, number: str,
) -> None:  # fmt: skip
    """Activation codes (m, planes of `bits`, columns), packed weights (n, row bytes) -> y (..., n), m rows."""
    if number == "fp8" and _cublas_takes(x.shape[0], y, width):
        _scaled_matmul(x[:, 0, :width], codes.contiguous(), step, scale, bias, y)
        if gelu is not None:  # of sums rounded to y's type, as in the uncompressed model
            torch.ops.aten.gelu_(y, approximate=gelu)
        return
    kernel = float8_matmul if number == "fp8" else integer_matmul
    tensors = (x, step, codes.contiguous(), float32(scale), contiguous(bias), y)
    _in_tiles(kernel, INTEGER, tensors, width, bits, GELU=gelu)


def unpacked_product(
    x: Tensor, step: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, width: int, bits: int, y: Tensor,
    gelu: str | None,
) -> None:  # fmt: skip
    """The same of activation codes in one plane, (m, 1, columns), for many rows."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    m, n = x.shape[0], y.shape[-1]
    x, w = x[:, 0], unpacked(codes, None, width, bits, torch.int8)
    factors, bias = float32(scale), contiguous(bias)

    def run(config: Config) -> None:
        tiles = triton.cdiv(m, config.rows) * triton.cdiv(n, config.outputs)
        a = TensorDescriptor.from_tensor(x, [config.rows, config.depth])
        b = TensorDescriptor.from_tensor(w, [config.outputs, config.depth])
        kernel: Any = dense_matmul[(min(tiles, processors(y.device)),)]
        kernel(
            a, b, step, factors, bias, y, m, n, width,
            BLOCK_M=config.rows, BLOCK_N=config.outputs, BLOCK_K=config.depth, GROUP=config.group, GELU=gelu,
            FLATTEN=bool(config.flatten), num_warps=config.warps, num_stages=config.stages, **EXACT,
        )  # fmt: skip

    problem = Problem("dense_matmul", "torch.int8", 8, bucket(m), n, width, 1)
    run(choose(problem, DENSE, run, y.device))


def _cublas_takes(rows: int, y: Tensor, width: int) -> bool:
    """Whether torch's own product of float8 rows with scales gives y (..., n): Hopper, bfloat16, whole 16 bytes.

    Later GPUs refuse scales of rows with some versions of torch.
    """
    if y.device.type != "cuda" or torch.cuda.get_device_capability(y.device)[0] != 9:
        return False
    return rows >= MANY_ROWS and y.dtype == torch.bfloat16 and width % 16 == 0 == y.shape[-1] % 16


def _scaled_matmul(x: Tensor, w: Tensor, step: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """x (m, in) · w (n, in)ᵀ, bit patterns both, · step (m,) · scale (n, 1) + bias -> y (..., n), m rows.

    Sums are carried over to float32 on the way, which the faster accumulation does not.
    """
    x, w, scale = x.view(torch.float8_e4m3fn), w.view(torch.float8_e4m3fn), scale.to(torch.float32)
    bias = None if bias is None else bias.to(y.dtype)
    y = y.view(x.shape[0], -1)
    torch._scaled_mm(x, w.t(), step[:, None], scale.t(), bias, out_dtype=y.dtype, use_fast_accum=False, out=y)


def weight_only_product(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int, number: str
) -> Tensor:
    """x (m, in) times the dequantized weight -> (m, n) in x.dtype.

    With many rows the weight is dequantized as a whole, for as long as the call lasts, and cuBLAS multiplies.
    """
    if x.shape[0] >= MANY_ROWS:
        weight = unpacked(codes, scale, x.shape[1], bits, x.dtype, number)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = x.new_empty(x.shape[0], codes.shape[0])
    groups = scale.shape[1]
    tensors = (in_planes(x, bits), codes.contiguous(), float32(scale), contiguous(bias), y)
    more = {"groups": groups, "group_size": x.shape[1] // groups, "FP8": number == "fp8"}
    _in_tiles(weight_only_matmul, FLOATING, tensors, x.shape[1], bits, **more)
    return y


def unpacked(
    codes: Tensor, scale: Tensor | None, width: int, bits: int, dtype: torch.dtype, number: str = "int"
) -> Tensor:
    """Packed weights (n, row bytes) -> their codes, or with scales (n, groups) their values, (n, width) in a type.

    Rows of codes lie a multiple of 128 bytes apart, as the copy engine wants them.
    """
    n, groups = codes.shape[0], 1 if scale is None else scale.shape[1]
    stride = padded_columns(width, 8) if scale is None else width
    w = torch.empty(n, stride, dtype=dtype, device=codes.device)
    rows, columns, row_bytes = n, width, codes.shape[1]
    if scale is None and stride == width and row_bytes * 8 == width * bits and n * width * bits < 2**31:
        rows, columns, row_bytes = 1, n * width, n * row_bytes  # rows without gaps are one row
    kernel: Any = unpack_rows[(rows * triton.cdiv(columns, _UNPACKED),)]
    kernel(
        codes.contiguous(), float32(scale), w, columns, row_bytes, stride, groups, width // groups,
        BITS=bits, BLOCK=_UNPACKED, FP8=number == "fp8", num_warps=4, **EXACT,
    )  # fmt: skip
    return w[:, :width]


def in_planes(x: Tensor, bits: int) -> Tensor:
    """x (m, in) -> (m, planes, columns), zeros at the end of a plane: the order in which codes.py reads weights."""
    count, length = planes(bits), padded_columns(x.shape[1], bits)
    return (
        F.pad(x, (0, count * length - x.shape[1])).unflatten(1, (length, count)).transpose(1, 2).contiguous()
    )


def plane_depth(config: Config, bits: int, integer: bool) -> int:
    """Columns of a plane in one step of a product; tensor cores multiply 32 bytes or 16 floats at least."""
    return max(32 if integer else 16, min(BLOCK, config.depth // planes(bits)))


def _in_tiles(
    kernel: Any, candidates: Sequence[Config], tensors: Sequence[Any], width: int, bits: int, **more: Any
) -> None:
    """Runs a product of `tensors`, as the kernel takes them: activations (m, planes, columns) first, y last."""
    x, y = tensors[0], tensors[-1]
    m, n = x.shape[0], y.shape[-1]
    count, length = planes(bits), columns_of(width, bits)
    integer = x.dtype == torch.int8
    row_bytes = -(-width * bits // 8)

    def run(config: Config) -> None:
        grid = (triton.cdiv(m, config.rows) * triton.cdiv(n, config.outputs),)
        depth = plane_depth(config, bits, integer)
        kernel[grid](
            *tensors, m, n, length, x.shape[2], row_bytes, **more,
            BITS=bits, PLANES=count, WHOLE=width % count == 0 and length % depth == 0,
            BLOCK_M=config.rows, BLOCK_N=config.outputs, BLOCK_K=depth, GROUP=config.group,
            num_warps=config.warps, num_stages=config.stages, **EXACT,
        )  # fmt: skip

    problem = Problem(kernel.__name__, str(x.dtype), bits, bucket(m), n, width, more.get("groups", 1))
    run(choose(problem, candidates, run, x.device))


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
