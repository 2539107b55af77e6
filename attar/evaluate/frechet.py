"""The Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500)."""

from __future__ import annotations

import torch
from torch import Tensor

from attar.errors import AttarError


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½) of the normal distributions with the sets' means and covariances.

    first, second: (N, d) and (M, d), N and M at least 2. 0 for equal sets; small sets are biased upwards.
    Raises AttarError for other shapes and for features that are not finite.
    """
    if (
        first.ndim != 2
        or second.ndim != 2
        or first.shape[1] != second.shape[1]
        or min(len(first), len(second)) < 2
    ):
        raise AttarError(f"features {tuple(first.shape)} and {tuple(second.shape)} cannot be compared")
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise AttarError("a feature is not finite")
    first, second = first.double(), second.double()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    one, two = (x.T.cov(correction=0).reshape(x.shape[1], -1) for x in (first, second))
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # C₁ C₂ has the eigenvalues of C₁^½ C₂ C₁^½, which is symmetric
    common = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    return max(0.0, (shift + one.trace() + two.trace() - 2 * common).item())
