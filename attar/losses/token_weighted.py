"""Attention-guided token weights and the token-weighted reconstruction loss.

Sparse Token Distillation of S²Q-VDiT (arXiv 2508.04016): tokens that receive much attention in the
full-precision block count more in the block's reconstruction loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attar.errors import AttarError


def token_weights(
    mass: Tensor, low: float = 0.5, high: float = 1.0, eps: float = 1e-4, cap_quantile: float | None = None
) -> Tensor:
    """λ of every token from the attention it receives: min–max of the mass into [low, high].

    λ_j = (S_j − min S) / (max S − min S) · (high − low) + low, the minimum and maximum taken inside each
    sample (S²Q-VDiT, STD; the paper has low = 0.5, high = 1).

    mass: (B, N), the column sums S of the post-softmax attention map over heads and queries.
    eps: a sample whose mass varies by less than eps relative to its maximum gets `high` for every token,
        because a division by rounding noise would invent weights.
    cap_quantile: saturate the mass at this quantile of its sample first, so that one attention sink does not
        push every other token to `low` (not in the paper).
    Returns (B, N) float32. Raises AttarError when the range or the quantile is out of order.
    """
    if not 0 < low <= high:
        raise AttarError(f"token weights need 0 < low <= high, got low={low}, high={high}")
    if cap_quantile is not None and not 0 < cap_quantile <= 1:
        raise AttarError(f"cap_quantile must lie in (0, 1], got {cap_quantile}")
    mass = mass.float()
    if cap_quantile is not None:
        cap = torch.quantile(mass, cap_quantile, dim=-1, keepdim=True)
        mass = torch.minimum(mass, cap)
    smallest, largest = mass.aminmax(dim=-1, keepdim=True)  # (B, 1) each
    spread = largest - smallest
    varied = spread > eps * largest.abs()
    position = (mass - smallest) / torch.where(varied, spread, torch.ones_like(spread))
    weights = position * (high - low) + low
    return torch.where(varied, weights, torch.full_like(weights, high))


def joint_token_weights(
    mass: Mapping[str, Tensor], order: Sequence[str] | None = None, over: str = "joint", **options
) -> dict[str, Tensor]:
    """λ of every stream of a joint-attention block: one min–max over the joint sequence, then split.

    mass: stream → (B, N_stream). order: streams in the order of the joint sequence (default: the mapping's);
    it fixes only the order of the result. over: "joint", or "stream" for a min–max inside each stream, so that text
    tokens that draw much attention do not press the video's weights together. options go to `token_weights`.
    Returns stream → (B, N_stream). Raises AttarError for any other `over`.
    """
    names = list(mass if order is None else order)
    if over not in ("joint", "stream"):
        raise AttarError(f"unknown range {over!r} of the token weights", fix="Use joint or stream")
    if over == "stream":
        return {name: token_weights(mass[name], **options) for name in names}
    joined = token_weights(torch.cat([mass[name] for name in names], dim=-1), **options)  # (B, ΣN)
    parts = joined.split([mass[name].shape[-1] for name in names], dim=-1)
    return dict(zip(names, parts, strict=True))


def weight_percentiles(weights: Tensor, percentiles: Sequence[float] = (50, 90, 99)) -> dict[float, float]:
    """Percentiles of λ over all tokens: they show an attention sink that turned STD into plain MSE."""
    ordered = weights.float().flatten().sort().values  # torch.quantile takes no more than 16 million numbers
    places = torch.tensor([p / 100 for p in percentiles], dtype=torch.float64) * (ordered.numel() - 1)
    below = places.floor().long()
    low, high = (ordered[i.to(ordered.device)].double().cpu() for i in (below, places.ceil().long()))
    values = torch.lerp(low, high, places - below)
    return dict(zip(percentiles, values.tolist(), strict=True))


def token_weighted_mse(pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over tokens of λ_j · ‖f(X)_j − f̂(X)_j‖² / d (S²Q-VDiT, STD).

    pred, target: (B, N, d); weights: (B, N). The paper's sum over channels is a mean here, so that λ ≡ 1
    gives the plain mean squared error; under AdamW the constant factor 1/d has no effect. Returns a scalar.
    """
    per_token = (pred.float() - target.float()).square().mean(dim=-1)  # (B, N, d) -> (B, N)
    return (per_token * weights).mean()


def streams_token_weighted_mse(
    pred: Mapping[str, Tensor], target: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Tensor:
    """`token_weighted_mse` over the joint sequence of several streams.

    pred, target: stream → (B, N_stream, d), or (B, C, H, W), whose tokens are the pixels; weights: stream →
    (B, N_stream). A stream without weights counts fully (λ = 1). Every token of every stream has the same share 1/ΣN.
    Raises AttarError when the streams of pred and target differ.
    """
    if set(pred) != set(target):
        raise AttarError(f"block outputs {sorted(pred)} but its targets are {sorted(target)}")
    total, tokens = None, 0
    for name, output in pred.items():
        squared = (output.float() - target[name].float()).square()
        per_token = squared.mean(dim=1).flatten(1) if squared.ndim == 4 else squared.mean(dim=-1)
        if name in weights:
            per_token = per_token * weights[name]
        total = per_token.sum() if total is None else total + per_token.sum()
        tokens += per_token.numel()
    if total is None:
        raise AttarError("a reconstruction loss needs at least one output stream")
    return total / tokens


def mass_concentration(mass: Tensor, points: int = 20) -> Tensor:
    """Share of the attention mass (B, N) that the most attended 5 %, 10 %, … 100 % of the tokens hold: (points,)."""
    shares = mass.sort(dim=1, descending=True).values.cumsum(1).mean(0) / mass.sum(1).mean()
    places = torch.linspace(0, mass.shape[1], points + 1)[1:].round().long().clamp_min(1)
    return shares[places - 1].cpu()
