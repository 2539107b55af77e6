"""Twin-log weights: one logarithmic grid for each sign, with an offset (LRQ-DiT, arXiv 2508.03485, "TLQ").

    V = log2(|w| + η),   code = round(V / δ - z),   |ŵ| = 2^(δ (code + z)) - η,   z = lo / δ

δ and z are of each row and sign, from the range [lo, hi] of V over the row's weights of that sign, both ends cut by a
percentile. The offset η and the percentiles of the two signs are the layer's: those of a grid with the smallest squared
error. Without an offset half of the levels lie next to zero, and the format is worse than plain rounding.

Of 2^b numbers 2^(b-1) are negative, one is zero and 2^(b-1) - 1 are positive: the released code has 2^(b-1) + 1 and
2^(b-1) levels, whose smallest are zero here and so the same one. Weights go to the nearest number, not to the nearest
logarithm, as in every table, which never has a larger error. z is no integer, as in the paper: rounding it moves the
range by up to half a step, by an amount that depends on the unit of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The released grid has the unit of a weight, so ours grows with the layer's standard deviation; it is the released one
# for a layer that has this one.
OFFSETS = (0.0, 0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
RELEASED_STD = 0.03
PERCENTILES = (0.98, 0.99, 0.999, 0.9999, 0.99999)


@dataclass(frozen=True)
class TwinLog:
    """What the search found for one weight.

    levels: (out, groups, 2^bits) in the unit of the weight, sorted. offset: η. percentiles: of the negative and of the
    positive side. errors: squared error summed over the weights of a sign, (offsets, 2, percentiles), float64.
    """

    levels: Tensor
    offset: float
    percentiles: tuple[float, float]
    errors: Tensor


def twin_log_levels(weight: Tensor, bits: int, released: bool = False) -> Tensor:
    """Levels in [-1, 1] for weights that are divided by the largest magnitude of their row or group.

    weight: (out, groups, n). released: the offsets as they are, whatever the unit of the weight. Returns
    (out, groups, 2^bits).
    """
    unit = 1.0 if released else weight.double().std().item() / RELEASED_STD
    levels = search_twin_log(weight, bits, [unit * offset for offset in OFFSETS]).levels
    largest = weight.abs().amax(-1, keepdim=True).to(levels.dtype)
    return (levels / torch.where(largest > 0, largest, 1)).clamp(-1, 1)


def search_twin_log(
    weight: Tensor, bits: int, offsets: Sequence[float], percentiles: Sequence[float] = PERCENTILES
) -> TwinLog:
    """The offset and the two percentiles with the smallest squared error over all of weight (out, groups, n).

    The sides share the offset only, so each percentile is searched apart and all combinations are covered.
    """
    half = 1 << (bits - 1)
    sides = [_Side(sign * weight, n, offsets, percentiles) for sign, n in ((-1, half), (1, half - 1))]
    errors = torch.stack([side.errors for side in sides], dim=1)
    best = int(errors.amin(-1).sum(-1).argmin())
    places = errors[best].argmin(-1).tolist()
    below, above = (side.levels(offsets[best], i) for side, i in zip(sides, places, strict=True))
    levels = torch.cat([-below.flip(-1), torch.zeros_like(above[..., :1]), above], dim=-1)
    return TwinLog(levels, offsets[best], (percentiles[places[0]], percentiles[places[1]]), errors)


class _Side:
    """The positive numbers of a weight (out, groups, n): their ranges, and the squared error of every candidate.

    They are sorted once, with running sums, so that the error of any levels costs one search in each row instead of a
    pass over the weight. Other numbers become zeros in front, which have no error.
    """

    def __init__(
        self, weight: Tensor, count: int, offsets: Sequence[float], percentiles: Sequence[float]
    ) -> None:
        ordered = weight.double().clamp(min=0).sort(-1).values
        self.count = count
        self.members = (ordered > 0).sum(-1, keepdim=True)
        self.ranges = [(self._quantile(ordered, 1 - p), self._quantile(ordered, p)) for p in percentiles]
        start = torch.zeros_like(ordered[..., :1])
        sums = torch.cat([start, ordered.cumsum(-1)], dim=-1)
        total = ordered.square().sum()
        errors = [
            total + _excess(self.levels(offset, i), ordered, sums)
            for offset in offsets
            for i in range(len(percentiles))
        ]
        self.errors = torch.stack(errors).view(len(offsets), len(percentiles))

    def levels(self, offset: float, percentile: int) -> Tensor:
        """(out, groups, count) ascending, above zero; all 0 in a row without positive numbers."""
        low, high = ((edge + offset).log2() for edge in self.ranges[percentile])
        codes = torch.arange(1, self.count + 1, device=low.device)
        exponents = low + (high - low) / self.count * codes  # δ (code + z)
        return torch.where(self.members > 0, (exponents.exp2() - offset).clamp(min=0), 0)

    def _quantile(self, ordered: Tensor, share: float) -> Tensor:
        """Of the positive numbers alone, (out, groups, 1); 0 where a row has none."""
        last = ordered.shape[-1] - 1
        place = (last + 1 - self.members + share * (self.members - 1).clamp(min=0).double()).clamp(max=last)
        lower, upper = (ordered.gather(-1, p.long()) for p in (place.floor(), place.ceil()))
        return torch.lerp(lower, upper, place.frac())


def _excess(levels: Tensor, ordered: Tensor, sums: Tensor) -> Tensor:
    """Σ (w - l)² - Σ w² with l the nearest to w of zero and the levels: Σ over levels of l² · count - 2 l · sum."""
    levels = torch.cat([torch.zeros_like(levels[..., :1]), levels], dim=-1)
    ends = torch.searchsorted(ordered, (levels[..., 1:] + levels[..., :-1]) / 2)
    first, last = torch.zeros_like(ends[..., :1]), torch.full_like(ends[..., :1], ordered.shape[-1])
    edges = torch.cat([first, ends, last], dim=-1)
    counts, totals = edges.diff(dim=-1), sums.gather(-1, edges).diff(dim=-1)
    return (levels * (levels * counts - 2 * totals)).sum()
