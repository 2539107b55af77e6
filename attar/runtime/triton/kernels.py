"""The kernels as functions of tensors. Shapes are checked by the caller (ops.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from attar.runtime.reference import integer_range
from attar.runtime.triton.codes import columns, padded_columns, planes
from attar.runtime.triton.matmul import integer_matmul, weight_only_matmul
from attar.runtime.triton.quantize import quantize_rows
from attar.runtime.triton.tune import Config, Problem, bucket, choose

Step = tuple[str, Sequence[Tensor]]
EXACT = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where the reference rounds twice
_CHUNK = 4096  # values of a row that a program holds at a time
_SHARING = 8  # tiles of rows that share the weights in the second-level cache
INTEGER = (
    Config(128, 128, 128, 8, 3),
    Config(128, 128, 64, 4, 4),
    Config(128, 256, 64, 8, 3),
    Config(256, 128, 64, 8, 3),
    Config(256, 128, 128, 8, 3),
    Config(64, 128, 128, 4, 3),
    Config(64, 64, 64, 4, 4),
    Config(32, 64, 128, 4, 4),
    Config(16, 64, 128, 4, 4),
)
FLOATING = (
    Config(128, 128, 32, 8, 3),
    Config(128, 64, 64, 4, 3),
    Config(64, 64, 32, 4, 3),
    Config(32, 64, 64, 4, 3),
    Config(16, 64, 64, 4, 3),
    Config(16, 32, 32, 4, 3),
)


class TritonKernels:
    """The backend `triton`, an `attar.runtime.backend.Kernels`."""

    def fusable(self, steps: Sequence[Step]) -> int:
        """A channel scale at the end is divided out while a row is read."""
        return 1 if steps and steps[-1][0] == "channel_scale" else 0

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
    ) -> Tensor:
        """x (m, in) -> channel scale -> codes -> integer product -> (m, out) in `out_dtype`."""
        y = x.new_empty(x.shape[0], codes.shape[0], dtype=out_dtype)
        if y.numel():
            with _on(x.device):
                channel = steps[0][1][0] if steps else None
                quantized, step = quantize(x, channel, clip, act_bits, weight_bits)
                codes = codes.contiguous()
                tensors = (quantized, step, codes, _float32(weight_scale), _contiguous(bias), y)
                _product(integer_matmul, INTEGER, tensors, codes, x.shape[1], weight_bits)
        return y

    def weight_only(
        self, x: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
    ) -> Tensor:
        """x (m, in) times the weight, which is dequantized tile by tile -> (m, out) in x.dtype."""
        y = x.new_empty(x.shape[0], codes.shape[0])
        if y.numel():
            with _on(x.device):
                codes = codes.contiguous()
                tensors = (in_planes(x, bits), codes, _float32(weight_scale), _contiguous(bias), y)
                groups = weight_scale.shape[1]
                more = {"groups": groups, "group_size": x.shape[1] // groups}
                _product(weight_only_matmul, FLOATING, tensors, codes, x.shape[1], bits, **more)
        return y


KERNELS = TritonKernels()


def quantize(
    x: Tensor, channel: Tensor | None, clip: Tensor | None, act_bits: int, weight_bits: int
) -> tuple[Tensor, Tensor]:
    """x (m, in) -> codes int8 (m, planes of `weight_bits`, columns), zeros at the end of a plane, and steps (m,)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    m, width = x.shape
    count, length = planes(weight_bits), padded_columns(width, weight_bits)
    quantized = torch.empty(m, count, length, dtype=torch.int8, device=x.device)
    step = torch.empty(m, dtype=torch.float32, device=x.device)
    most = float(integer_range(act_bits)[1])
    block = min(triton.next_power_of_2(length), _CHUNK // count)
    launch: Any = quantize_rows[(m,)]
    launch(
        x, _float32(channel), _float32(clip), quantized, step, width, length, x.stride(0), count * length,
        MOST=most, PLANES=count, BLOCK=block, num_warps=4, **EXACT,
    )  # fmt: skip
    return quantized, step


def in_planes(x: Tensor, bits: int) -> Tensor:
    """x (m, in) -> (m, planes, columns), zeros at the end of a plane: the order in which codes.py reads weights."""
    count, length = planes(bits), padded_columns(x.shape[1], bits)
    return (
        F.pad(x, (0, count * length - x.shape[1])).unflatten(1, (length, count)).transpose(1, 2).contiguous()
    )


def _product(
    kernel: Any,
    candidates: Sequence[Config],
    tensors: Sequence[Any],
    codes: Tensor,
    width: int,
    bits: int,
    **more: int,
) -> None:
    """Runs a product of `tensors`, as the kernel takes them: activations (m, planes, columns) first, y (m, n) last."""
    x, (m, n) = tensors[0], tensors[-1].shape
    count, length = planes(bits), columns(width, bits)

    def run(config: Config) -> None:
        grid = (triton.cdiv(m, config.rows) * triton.cdiv(n, config.outputs),)
        kernel[grid](
            *tensors, m, n, length, x.shape[2], codes.shape[1], **more,
            BITS=bits, PLANES=count, WHOLE=width % count == 0 and length % config.depth == 0,
            BLOCK_M=config.rows, BLOCK_N=config.outputs, BLOCK_K=config.depth, GROUP=_SHARING,
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
