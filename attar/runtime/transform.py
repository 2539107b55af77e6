"""What a transform of a linear layer is, whatever its kind (transforms.py), and what all kinds check alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attar.errors import AttarError
from attar.runtime.float32 import KeepsBufferDtype


class Transform(KeepsBufferDtype):
    """x (..., d) -> x T (..., d). Subclasses give `kind`, `names`, `activation_side`, weight_side and its inverse."""

    kind: str
    names: tuple[str, ...]  # of the buffers that `activation_side` takes beside x

    def operands(self) -> list[Tensor]:
        """The tensors of the transform, in the order in which `activation_side` takes them."""
        buffers: dict[str, Any] = self._buffers  # an attribute of a module takes a microsecond
        return [buffers[name] for name in self.names]

    @staticmethod
    def activation_side(x: Tensor, *operands: Tensor) -> Tensor:
        """x (..., d) -> x T (..., d) in float32 (float64 if x is): the definition that kernels must match."""
        raise NotImplementedError

    def forward(self, x: Tensor | None) -> Any:
        """x T, or without an x the operands: hooks that bring a module's offloaded tensors run in a call only."""
        return self.operands() if x is None else self.activation_side(x, *self.operands())

    def check(self) -> None:
        """Raises AttarError for values that no transform of the kind has. Of matrices, only whether they are finite."""
        for name, buffer in self.named_buffers():
            if not buffer.is_meta and not bool(torch.isfinite(buffer).all()):
                raise AttarError(f"{name} must be finite", where=type(self).__name__)

    def config(self) -> dict[str, Any]:
        """What `from_config` needs, beside the width, to make a transform with the same buffers' shapes."""
        return {"kind": self.kind}

    @classmethod
    def from_config(cls, config: dict[str, Any], d: int, device: Any = "meta") -> Transform:
        """A transform of width d with placeholder buffers, to load a checkpoint into."""
        raise NotImplementedError

    def weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """W (out, d) -> W T^{-T} (out, d) in `dtype`."""
        raise NotImplementedError

    def inverse_weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """W̃ (out, d) -> W̃ Tᵀ (out, d) in `dtype`: undoes `weight_side`."""
        raise NotImplementedError


def inverse(matrix: Tensor) -> Tensor:
    """In float64, of one matrix or of each of a batch."""
    return torch.linalg.inv(matrix.to(torch.float64))


def float32(x: Tensor) -> Tensor:
    """A copy: a transform must not share memory with the parameter it was baked from."""
    return x.detach().to(torch.float32, copy=True).contiguous()


def half(x: Tensor) -> Tensor:
    """A copy in float16. What is too large for it becomes its largest number."""
    most = torch.finfo(torch.float16).max
    return x.detach().clamp(-most, most).to(torch.float16, copy=True)


def check_invertible(matrix: Tensor, where: str, ndim: int = 2) -> None:
    """Raises AttarError unless it is a finite and invertible matrix, or for more axes a batch of such matrices."""
    if matrix.ndim != ndim or matrix.shape[-2] != matrix.shape[-1]:
        raise AttarError(f"a transform matrix must be square, found {tuple(matrix.shape)}", where=where)
    if matrix.is_meta:
        return
    if not bool(torch.isfinite(matrix).all()):
        raise AttarError("a transform matrix must be finite", where=where)
    if not bool(torch.isfinite(torch.linalg.inv_ex(matrix.detach().to(torch.float64))[0]).all()):
        raise AttarError("a transform matrix must be invertible", where=where)


def only(config: dict[str, Any], *fields: str) -> None:
    """Raises AttarError for a field of a transform's config that is none of these."""
    unknown = sorted(set(config) - set(fields))
    if unknown:
        raise AttarError(
            f"unknown field {unknown[0]!r} of transform {config.get('kind')!r}",
            fix="Update attar, or compress the model again",
        )
