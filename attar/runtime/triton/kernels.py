"""The kernels as functions of tensors. Shapes are checked by the caller (ops.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from attar.runtime.branch import Branch, finished
from attar.runtime.triton.activations import Step, quantize, rotates
from attar.runtime.triton.products import (
    packed_product,
    unpacked_product,
    unpacks_first,
    weight_only_product,
)


class TritonKernels:
    """The backend `triton`, an `attar.runtime.backend.Kernels`."""

    def fusable(self, steps: Sequence[Step], x: Tensor) -> int:
        """A channel shift, a channel scale and a rotation, in this order, are computed while a row is quantized."""
        fused = 1 if steps and rotates(steps[-1], x.dtype, x.device) else 0
        for kind in ("channel_scale", "channel_shift"):
            fused += fused < len(steps) and steps[len(steps) - 1 - fused][0] == kind
        return fused

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
        branch: Branch | None = None,
    ) -> Tensor:
        """x (..., in) -> transforms -> codes -> product of integers or float8 -> (..., out) in `out_dtype`.

        A branch, and GELU behind it, are added to the rounded product.
        """
        shape, width = x.shape[:-1], x.shape[-1]
        y = x.new_empty(*shape, codes.shape[0], dtype=out_dtype)
        if not y.numel():
            return y
        first = gelu if branch is None else None
        with _on(x.device):
            product = "fp8" if number == "fp8" else "int"
            if unpacks_first(shape.numel(), product, x.device):
                found = quantize(x, clip, act_bits, 8, steps, number)
                unpacked_product(*found, codes, weight_scale, bias, width, weight_bits, y, first)
            else:
                found = quantize(x, clip, act_bits, weight_bits, steps, number)
                packed_product(*found, codes, weight_scale, bias, width, weight_bits, y, first, product)
        return y if branch is None else finished(y, branch, gelu)

    def weight_only(
        self,
        x: Tensor,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        bits: int,
        number: str = "int",
    ) -> Tensor:
        """x (..., in) times the dequantized weight -> (..., out) in x.dtype."""
        shape = (*x.shape[:-1], codes.shape[0])
        if not x.numel() or not codes.shape[0]:
            return x.new_empty(shape)
        with _on(x.device):
            x = x.reshape(-1, x.shape[-1])
            return weight_only_product(x, codes, weight_scale, bias, bits, number).view(shape)


KERNELS = TritonKernels()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, not on that of its arguments."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
