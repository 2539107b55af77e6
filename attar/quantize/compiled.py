"""Fake quantization and Kronecker rotations by the compiled kernels of the runtime, with their gradients.

They do in one pass over the rows what takes PyTorch a dozen (`python -m benchmarks.learning_step` measures it).
The functions of `formats` and `transforms` choose them by `compiled_for`, and are the definition of what they
compute: fake quantization bit for bit, rotations and gradients up to the order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attar.runtime.backend import backend_name, forced_backend
from attar.runtime.cpu import learning

LARGEST_CAYLEY = 128  # beyond that width LAPACK's blocked inverse is faster


def compiled_for(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: float32 on CPU, not empty, where the backend is `cpu`."""
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() for t in tensors)
    return fits and forced_backend() in (None, "cpu") and backend_name("cpu") == "cpu"


class FakeQuantizeRows(torch.autograd.Function):
    """`formats._FakeQuantizeRange` of x (..., k), for factors (f_lo, f_hi) of all rows (2,) or of each row (2, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, bits: int, number: str) -> Tensor:
        x, factors = x.contiguous(), factors.contiguous()
        y, extremes = learning.fake_quantize(x, factors, bits, number == "full_range")
        ctx.save_for_backward(x, factors, extremes)
        ctx.bits, ctx.full_range = bits, number == "full_range"
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, factors, extremes = ctx.saved_tensors
        with_x, with_factors = ctx.needs_input_grad[:2]
        grad_x, grad_rows = learning.fake_quantize_backward(
            grad.contiguous(), x, factors, ctx.bits, extremes, ctx.full_range, with_x
        )
        if not with_factors:
            return grad_x, None, None, None
        return grad_x, grad_rows.sum(1) if factors.ndim == 1 else grad_rows.view(factors.shape), None, None


class KroneckerRows(torch.autograd.Function):
    """`transforms.apply_kronecker`: x (..., l·r), left (l, l), right (r, r) -> x (left ⊗ right)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        x, left, right = x.contiguous(), left.contiguous(), right.contiguous()
        ctx.save_for_backward(x, left, right)
        return learning.kronecker(x, left, right)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        needs_x, *needs_factors = ctx.needs_input_grad
        x, left, right = ctx.saved_tensors
        return learning.kronecker_backward(grad.contiguous(), x, left, right, needs_x, any(needs_factors))


class CayleyMatrices(torch.autograd.Function):
    """`transforms.cayley`: parameters (..., n, n) -> rotations."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        rotation, inverse = learning.cayley(parameter.contiguous())
        ctx.save_for_backward(inverse)
        return rotation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return learning.cayley_backward(grad.contiguous(), *ctx.saved_tensors)
