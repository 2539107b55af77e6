"""Rows of activations -> transforms -> codes and step sizes: which launch does it, and with what."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attar.runtime.formats import largest
from attar.runtime.triton.available import processors, shared_memory
from attar.runtime.triton.codes import BLOCK, padded_columns, planes
from attar.runtime.triton.quantize import quantize_rows
from attar.runtime.triton.rotate import quantize_rotated_rows
from attar.runtime.triton.tune import Config, Problem, bucket, choose

Step = tuple[str, Sequence[Tensor]]
EXACT = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where the reference rounds twice
_LARGEST_ROW = 2**14  # values of a row that a program holds in registers
_CHUNK = 2048  # of a longer one, those that it holds at a time
_LARGEST_FACTOR = 256  # of a rotation that is computed with the codes
_LARGEST_EXACT = 2**11  # numbers of a float32 row that is: three products for one, in registers


# rows: programs for each processor. A program reads and rounds the factors once, for many rows.
ROTATIONS = (Config(4, 0, 0, 4, 1), Config(8, 0, 0, 4, 1), Config(16, 0, 0, 2, 1), Config(2, 0, 0, 8, 1))


class Factors(NamedTuple):
    """A rotation left ⊗ right, of sizes LEFT · RIGHT = width. order: of a Hadamard base, 0 for matrices."""

    order: int
    left: int
    right: int

    @property
    def padded(self) -> tuple[int, int]:
        """Both sizes as powers of two; tensor cores multiply 16 at least."""
        return bucket(self.left), bucket(self.right)

    @property
    def work(self) -> int:
        """Multiplications for a row."""
        left, right = self.padded
        return left * right * (left + right)

    @property
    def memory(self) -> int:
        """Bytes of shared memory for both factors and a row between them, in half precision."""
        left, right = self.padded
        return 2 * (left * left + right * right + left * right)


def factors(step: Step) -> Factors | None:
    """How a rotation of whole rows comes apart, with the least work; None for other transforms."""
    kind, operands = step
    if kind == "kronecker":
        return Factors(0, operands[0].shape[0], operands[1].shape[0])
    if kind == "hadamard" and operands[0].shape[0] == 1:
        return _hadamard_factors(operands[0].shape[1], operands[1].shape[0])
    return None


@functools.cache
def _hadamard_factors(width: int, order: int) -> Factors:
    powers = (width // order).bit_length()
    found = [Factors(order, order << p, (width // order) >> p) for p in range(powers)]
    return min(found, key=lambda f: f.work)


def rotates(step: Step, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a transform of rows of a type is a rotation that one launch computes with the codes."""
    found = factors(step)
    return found is not None and _fits(found, dtype, device)


@functools.cache
def _fits(found: Factors, dtype: torch.dtype, device: torch.device) -> bool:
    if max(found.padded) > _LARGEST_FACTOR:
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10:
        return False  # Triton's compiler fails on these products for B200
    if dtype == torch.float32:
        return found.padded[0] * found.padded[1] <= _LARGEST_EXACT
    return found.memory <= shared_memory(device)


def quantize(
    x: Tensor,
    clip: Tensor | None,
    act_bits: int,
    weight_bits: int,
    steps: Sequence[Step] = (),
    number: str = "int",
) -> tuple[Tensor, Tensor]:
    """x (..., in), m rows -> codes int8 (m, planes of `weight_bits`, columns), zeros at planes' ends, and steps (m,).

    steps: a channel shift, a channel scale, a rotation for which `rotates` holds, or some of these in this order.
    number: "int", "full_range", or "fp8", whose bit patterns the codes are.
    """
    m, width = x.shape[:-1].numel(), x.shape[-1]
    row = width  # numbers from one to the next
    if x.ndim == 2 and x.stride(1) == 1:
        row = x.stride(0)
    else:
        x = x.contiguous()
    count, length = planes(weight_bits), padded_columns(width, weight_bits)
    codes = torch.empty(m, count, length, dtype=torch.int8, device=x.device)
    step = torch.empty(m, dtype=torch.float32, device=x.device)
    constants = _constants(act_bits, count, number)
    steps = list(steps)
    channels = [
        float32(steps.pop(0)[1][0]) if steps and steps[0][0] == kind else None
        for kind in ("channel_shift", "channel_scale")
    ]
    if steps:
        _rotated(x, row, channels, steps[0], float32(clip), codes, step, constants)
        return codes, step
    plain: Any = quantize_rows[(m,)]
    plain(
        x, *channels, float32(clip), codes, step, width, length, row, count * length,
        **_pieces(width, length, count), **constants,
    )  # fmt: skip
    return codes, step


@functools.cache
def _constants(act_bits: int, count: int, number: str) -> dict[str, Any]:
    """What every launch is compiled for. count: planes."""
    formats = {"FP8": number == "fp8", "SIGNED": number == "full_range"}
    return {"MOST": largest(number, act_bits), "PLANES": count, **formats, **EXACT}


@functools.cache
def _pieces(width: int, length: int, count: int) -> dict[str, Any]:
    """Two powers of two that together hold `length` columns of `count` planes, or a chunk of a row too long, and how
    much of them is in the row for sure."""
    first, second = _CHUNK // count, 0
    if length * count <= _LARGEST_ROW:
        first = 1 << (length.bit_length() - 1)
        second = 1 << (length - first - 1).bit_length() if length > first else 1
    full = sum(end * count <= width for end in (first, first + second))
    warps = 2 if width <= _CHUNK else 4 if width <= 5 * _CHUNK else 8
    return {"FIRST": first, "SECOND": second, "FULL": full, "num_warps": warps}


def _rotated(
    x: Tensor,
    row: int,
    channels: Sequence[Tensor | None],
    rotation: Step,
    clip: Tensor | None,
    codes: Tensor,
    step: Tensor,
    constants: Any,
) -> None:
    found = factors(rotation)
    assert found is not None
    m, width, (left, right) = codes.shape[0], x.shape[-1], found.padded
    if found.order:
        signs, base = (operand.contiguous() for operand in rotation[1])
        tensors, norm = (signs, base, None), width**-0.5
    else:
        tensors, norm = (None, *(float32(operand) for operand in rotation[1])), 1.0

    def run(config: Config) -> None:
        kernel: Any = quantize_rotated_rows[(min(m, config.rows * processors(x.device)),)]
        kernel(
            x, *channels, *tensors, clip, codes, step, m, codes.shape[2], row, codes.stride(0), norm,
            ORDER=found.order, LEFT=found.left, RIGHT=found.right, L=left, R=right, HALF=x.dtype != torch.float32,
            BLOCK=BLOCK, num_warps=config.warps, num_stages=config.stages, **constants,
        )  # fmt: skip

    problem = Problem(
        "quantize_rotated_rows", str(x.dtype), found.order, bucket(m), left, right, codes.shape[1]
    )
    run(choose(problem, ROTATIONS, run, x.device))


def float32(tensor: Tensor | None) -> Tensor | None:
    """The tensor as kernels read it."""
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()
