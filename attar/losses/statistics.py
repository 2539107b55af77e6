"""How far features' statistics are from those that a normalisation layer keeps (ZeroQ, arXiv 2001.00281)."""

from __future__ import annotations

import torch
from torch import Tensor

from attar.errors import AttarError

EPS = 1e-6  # below the square roots, whose slope at zero has no end


def statistics_distance(x: Tensor, mean: Tensor, variance: Tensor, per_sample: bool = False) -> Tensor:
    """‖μ(x) − μ‖² + ‖σ(x) − σ‖², norms over channels.

    x: features (B, C, ...). mean, variance: (C,). per_sample: μ(x) and σ(x) are of each sample alone, over its places,
    and the result is the mean over samples (ZeroQ's code); by default they are of the batch, over samples and places
    (ZeroQ's paper, Genie, and what batch normalisation itself keeps). Deviations are those of the population, with
    1e-6 added to each variance. Computed in float32, or in float64 for such features. Returns a scalar.
    Raises AttarError for features of one place where the statistics are those of samples.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x.flatten(2) if x.ndim > 2 else x[..., None]  # (B, C, places)
    if per_sample and x.shape[2] < 2:
        raise AttarError(
            "features of one place have no deviation of their own",
            fix='Take the statistics of the batch (statistics="batch")',
        )
    axes = (2,) if per_sample else (0, 2)
    found, own = x.var(axes, correction=0), x.mean(axes)  # (B, C) or (C,)
    deviation = (found + EPS).sqrt() - (variance.to(x.dtype) + EPS).sqrt()
    distance = (own - mean.to(x.dtype)).square().sum(-1) + deviation.square().sum(-1)
    return distance.mean()
