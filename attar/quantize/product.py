"""What a layer computes while it learns: its quantized input times its weight, and what a branch adds."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from attar.quantize.formats import fake_quantize_tokens
from attar.quantize.recompute import recomputed_by_rows
from attar.runtime.autocast import as_linear, full_precision


def quantized_product(
    x: Tensor,
    transform: Callable[[Tensor], Tensor],
    quantize: Callable[[Tensor], Tensor],
    weight: Tensor,
    bias: Tensor | None,
    branch: Callable[[Tensor], Tensor | None],
    whole: bool,
) -> Tensor:
    """quantize(transform(x)) · weightᵀ + bias + branch(x), in memory for a piece of the rows at a time.

    x: (..., in). weight: (out, in). branch: what is added to the rows of x, or None for nothing. whole: it has to see
    all rows at once, as a gate over frames does, which must know which row is which. Differentiable in all that is
    given, as far as `transform`, `quantize` and `branch` are. Returns (..., out), in the type of x or of autocast.
    """

    def rows(x: Tensor) -> Tensor:
        with full_precision(x.device):
            y = quantize(transform(x))
        w = weight.to(y.dtype)
        z = as_linear(F.linear(y, w, None if bias is None else bias.to(w.dtype)), x)
        return z if whole else add(z, x)

    def add(z: Tensor, x: Tensor) -> Tensor:
        added = branch(x)
        return z if added is None else z + added

    z = recomputed_by_rows(rows, x)
    return add(z, x) if whole else z


def quantized_acts(y: Tensor, bits: int | None, clip: Tensor | None, number: str) -> Tensor:
    """`fake_quantize_tokens`, or y itself where activations stay in floating point (bits None)."""
    return y if bits is None else fake_quantize_tokens(y, bits, clip, number)
