"""The kernels as functions of tensors. Shapes are checked by the caller (ops.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from attar.runtime.formats import largest
from attar.runtime.triton.codes import BLOCK, columns, padded_columns, planes
from attar.runtime.triton.matmul import float8_matmul, integer_matmul, weight_only_matmul
from attar.runtime.triton.quantize import quantize_rows
from attar.runtime.triton.rotate import quantize_rotated_rows
from attar.runtime.triton.tune import Config, Problem, bucket, choose

Step = tuple[str, Sequence[Tensor]]
EXACT = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where the reference rounds twice
_CHUNK = 4096  # values of a row that a program holds at a time
_LARGEST_BASE, _LARGEST_ROW = 32, 2**14  # of a Hadamard rotation that is computed with the codes
_SHARING = 8  # tiles of rows that share the weights in the second-level cache
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
FLOATING = (
    Config(64, 64, 64, 4, 2),
    Config(128, 64, 64, 4, 3),
    Config(128, 128, 64, 8, 2),
    Config(128, 128, 64, 8, 3),
    Config(32, 64, 64, 4, 2),
    Config(16, 64, 64, 4, 2),
    Config(16, 32, 128, 4, 3),
)


class TritonKernels:
    """The backend `triton`, an `attar.runtime.backend.Kernels`."""

    def fusable(self, steps: Sequence[Step]) -> int:
        """A channel scale, a Hadamard rotation, or both in this order, are computed while a row is quantized."""
        rotation = 1 if steps and _rotates(steps[-1]) else 0
        before = steps[: len(steps) - rotation]
        return rotation + (1 if before and before[-1][0] == "channel_scale" else 0)

    def linear(
        self,
        x: Tensor,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        clip: Tensor | None,
        weight_bits: int,
        act_bits: int,
        steps: Sequence[Step],
        out_dtype: torch.dtype,
        gelu: str | None = None,
        number: str = "int",
    ) -> Tensor:
        """x (m, in) -> channel scale -> codes -> product of integers or float8 -> (m, out) in `out_dtype`."""
        y = x.new_empty(x.shape[0], codes.shape[0], dtype=out_dtype)
        if y.numel():
            with _on(x.device):
                quantized, step = quantize(x, clip, act_bits, weight_bits, steps, number)
                codes = codes.contiguous()
                tensors = (quantized, step, codes, _float32(weight_scale), _contiguous(bias), y)
                kernel = float8_matmul if number == "fp8" else integer_matmul
                _product(kernel, INTEGER, tensors, codes, x.shape[1], weight_bits, GELU=gelu)
        return y

    def weight_only(
        self,
        x: Tensor,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        bits: int,
        number: str = "int",
    ) -> Tensor:
        """x (m, in) times the weight, which is dequantized tile by tile -> (m, out) in x.dtype."""
        y = x.new_empty(x.shape[0], codes.shape[0])
        if y.numel():
            with _on(x.device):
                codes = codes.contiguous()
                tensors = (in_planes(x, bits), codes, _float32(weight_scale), _contiguous(bias), y)
                groups = weight_scale.shape[1]
                more = {"groups": groups, "group_size": x.shape[1] // groups, "FP8": number == "fp8"}
                _product(weight_only_matmul, FLOATING, tensors, codes, x.shape[1], bits, **more)
        return y


KERNELS = TritonKernels()


def quantize(
    x: Tensor,
    clip: Tensor | None,
    act_bits: int,
    weight_bits: int,
    steps: Sequence[Step] = (),
    number: str = "int",
) -> tuple[Tensor, Tensor]:
    """x (m, in) -> codes int8 (m, planes of `weight_bits`, columns), zeros at the end of a plane, and steps (m,).

    steps: transforms that `TritonKernels.fusable` counts. number: "int", or "fp8", whose bit patterns the codes are.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    m, width = x.shape
    count, length = planes(weight_bits), padded_columns(width, weight_bits)
    quantized = torch.empty(m, count, length, dtype=torch.int8, device=x.device)
    step = torch.empty(m, dtype=torch.float32, device=x.device)
    most, fp8 = largest(number, act_bits), number == "fp8"
    operands = dict(steps)
    channel = _float32(operands["channel_scale"][0]) if "channel_scale" in operands else None
    sizes = (width, length, x.stride(0), count * length)
    if "hadamard" in operands:
        signs, base = (operand.contiguous() for operand in operands["hadamard"])
        order, across = base.shape[0], width // base.shape[0]
        rotated: Any = quantize_rotated_rows[(m,)]
        rotated(
            x, channel, signs, base, _float32(clip), quantized, step, *sizes, width**-0.5,
            ORDER=order, MOST=most, PLANES=count, L=rows_of_base(order), R=across, LOG_R=across.bit_length() - 1,
            BLOCK=BLOCK, FP8=fp8, num_warps=8 if width > _CHUNK else 4, **EXACT,
        )  # fmt: skip
        return quantized, step
    plain: Any = quantize_rows[(m,)]
    plain(
        x, channel, _float32(clip), quantized, step, *sizes,
        MOST=most, PLANES=count, BLOCK=min(triton.next_power_of_2(length), _CHUNK // count), FP8=fp8,
        num_warps=4, **EXACT,
    )  # fmt: skip
    return quantized, step


def _rotates(step: Step) -> bool:
    """Whether a transform is a Hadamard rotation of whole rows that a program can hold; others are left to torch."""
    if step[0] != "hadamard":
        return False
    (blocks, width), order = step[1][0].shape, step[1][1].shape[0]
    across = width // order
    return (
        blocks == 1
        and order <= _LARGEST_BASE
        and across >= 16
        and rows_of_base(order) * across <= _LARGEST_ROW
    )


def rows_of_base(order: int) -> int:
    """The rows that a base matrix takes: tensor cores multiply 16 at least."""
    return 1 if order == 1 else max(16, 1 << (order - 1).bit_length())


def in_planes(x: Tensor, bits: int) -> Tensor:
    """x (m, in) -> (m, planes, columns), zeros at the end of a plane: the order in which codes.py reads weights."""
    count, length = planes(bits), padded_columns(x.shape[1], bits)
    return (
        F.pad(x, (0, count * length - x.shape[1])).unflatten(1, (length, count)).transpose(1, 2).contiguous()
    )


def plane_depth(config: Config, bits: int, integer: bool) -> int:
    """Columns of a plane in one step of a product; tensor cores multiply 32 bytes or 16 floats at least."""
    return max(32 if integer else 16, min(BLOCK, config.depth // planes(bits)))


def _product(
    kernel: Any,
    candidates: Sequence[Config],
    tensors: Sequence[Any],
    codes: Tensor,
    width: int,
    bits: int,
    **more: Any,
) -> None:
    """Runs a product of `tensors`, as the kernel takes them: activations (m, planes, columns) first, y (m, n) last."""
    x, (m, n) = tensors[0], tensors[-1].shape
    count, length = planes(bits), columns(width, bits)
    integer = x.dtype == torch.int8

    def run(config: Config) -> None:
        grid = (triton.cdiv(m, config.rows) * triton.cdiv(n, config.outputs),)
        depth = plane_depth(config, bits, integer)
        kernel[grid](
            *tensors, m, n, length, x.shape[2], codes.shape[1], **more,
            BITS=bits, PLANES=count, WHOLE=width % count == 0 and length % depth == 0,
            BLOCK_M=config.rows, BLOCK_N=config.outputs, BLOCK_K=depth, GROUP=_SHARING,
            num_warps=config.warps, num_stages=config.stages, **EXACT,
        )  # fmt: skip

    fitting = [config for config in candidates if config.rows <= bucket(m)]
    problem = Problem(kernel.__name__, str(x.dtype), bits, bucket(m), n, width, more.get("groups", 1))
    run(choose(problem, fitting, run, x.device))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, not on that of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
