"""Relation distillation: which places of a feature map resemble each other, in the student as in the teacher.

MPQ-DM (arXiv 2412.11549, its time-smoothed relation distillation) compares features that are averaged over neighbouring
denoising steps, place with place; MPQ-DMv2 (arXiv 2507.04290) compares places with a memory of the teacher's places
from all denoising steps. Cosines make the comparison independent of the features' size, and of a rotation of their
channels. BiBERT (arXiv 2203.06390, direction-matching distillation) compares the matrices of inner products by their
direction.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from attar.errors import AttarError

_TINY = 1e-30  # of features that are all zero, whose P has no direction and stays zero


def smoothed(features: Tensor, steps: int, window: int) -> Tensor:
    """Mean over windows of consecutive denoising steps, float32: (steps · B, …) -> (steps / window · B, …).

    The first axis holds, step after step, the B samples of each. Raises AttarError where it does not, or the windows do
    not divide the steps.
    """
    if steps % window or features.shape[0] % steps:
        raise AttarError(
            f"{features.shape[0]} samples of {steps} steps cannot be averaged over windows of {window}"
        )
    return features.float().unflatten(0, (steps // window, window, -1)).mean(1).flatten(0, 1)


def relation_divergence(pred: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p ‖ p̂) of the rows of p = softmax(F Fᵀ / τ), F normalised along its channels; mean over rows and samples.

    pred, target: (B, N, C). Only `pred` gets a gradient. The released code of MPQ-DM takes the sum over rows, and both
    of its features without a gradient.
    """
    ours, full = (normalize(f.float(), dim=-1) for f in (pred, target.detach()))
    return _divergence(ours @ ours.mT, full @ full.mT, temperature)


def memory_divergence(pred: Tensor, target: Tensor, memory: Tensor, temperature: float = 0.1) -> Tensor:
    """KL(p ‖ p̂) of the rows of p = softmax(F Vᵀ / τ) over the rows of a memory V, mean over places and samples.

    pred, target: (B, N, C). memory: (J, C), rows of unit norm. Only `pred` gets a gradient.
    """
    ours, full = (normalize(f.float(), dim=-1) for f in (pred, target.detach()))
    anchors = memory.detach().to(ours)
    return _divergence(ours @ anchors.T, full @ anchors.T, temperature)


def direction_distance(pred: Tensor, target: Tensor) -> Tensor:
    """‖P̂/‖P̂‖_F − P/‖P‖_F‖_F with P = Z Zᵀ/√C of each sample, mean over samples; a scalar from 0 to √2.

    pred, target: (B, N, C), N places. Only `pred` gets a gradient. 0 where the features are the same up to a factor of
    the sample and an orthogonal matrix on the channels. √C cancels. Unlike with cosines, places count by their size.
    The released code leaves out entries of P below -100, and adds up queries, keys and values of all layers.
    """
    ours, full = (
        _direction(f.to(torch.promote_types(f.dtype, torch.float32))) for f in (pred, target.detach())
    )
    return torch.linalg.vector_norm(ours - full, dim=(-2, -1)).mean()


def _direction(features: Tensor) -> Tensor:
    """P over its norm, (B, N, N)."""
    # features of the size of one first, so that no product leaves the range of the type
    features = features / features.detach().abs().amax((-2, -1), keepdim=True).clamp(min=_TINY)
    return normalize((features @ features.mT).flatten(-2), dim=-1).unflatten(-1, (features.shape[-2], -1))


def _divergence(ours: Tensor, full: Tensor, temperature: float) -> Tensor:
    """In float64: cosines without a small temperature give nearly uniform rows, whose divergence is tiny."""
    ours, full = ((t.double() / temperature).log_softmax(-1) for t in (ours, full))
    return (full.exp() * (full - ours)).sum(-1).mean().float()
