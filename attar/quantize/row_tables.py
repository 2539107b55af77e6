"""Tables that each row has to itself, or each group of weights: binary planes, residual grids, and the best of all.

    binary       {m - α, m + α} with m the mean and α = mean |w - m|: sign(w - m), as in BiBERT (arXiv 2203.06390)
    dual_binary  {0, α1, α2, α1 + α2}, two planes of {0, 1} with a scale each (DB-LLM, arXiv 2402.11960)
    residual     {q_k - α, q_k + α}, a uniform grid and one binary residual plane (MPQ-DMv2, arXiv 2507.04290)
    lloyd        2^bits free levels, k-means in one dimension

Each has a start, its parameters for the rows (R, n) in [-1, 1] that a layer begins with, and a function from parameters
(..., p) to levels (..., 2^bits), not yet sorted, through which the parameters can be trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attar.quantize.sorted_rows import SortedRows

SHRINK = tuple(1 - 0.01 * i for i in range(80))  # of the range: 1.00, 0.99 … 0.21


def as_table(levels: Tensor) -> Tensor:
    """Levels as a table has them: sorted, and cut to [-1, 1], where all weights lie."""
    return levels.clamp(-1, 1).sort(dim=-1).values


# --------------------------------------------------------------------------------------------------- one plane


def binary_levels(parameters: Tensor, bits: int) -> Tensor:
    """(mean, α) -> its two levels, which are nearest to what lies below and above the mean."""
    mean, size = parameters.unbind(-1)
    return torch.stack([mean - size, mean + size], dim=-1)


def binary_start(rows: Tensor, bits: int) -> Tensor:
    """(mean, α): of all levels m ± α, α = mean |w - m| has the smallest squared error.

    BiBERT's own levels ±mean |w| drop the mean after it has decided the sign; a table keeps it at no cost.
    """
    mean = rows.double().mean(-1)
    return torch.stack([mean, (rows - mean[:, None]).abs().mean(-1)], dim=-1)


# --------------------------------------------------------------------------------------------------- two planes


def dual_levels(parameters: Tensor, bits: int) -> Tensor:
    """(α1, α2) -> {0, α2, α1, α1 + α2}."""
    first, second = parameters.unbind(-1)
    return torch.stack([torch.zeros_like(first), second, first, first + second], dim=-1)


def dual_plain(rows: Tensor, bits: int) -> Tensor:
    """DB-LLM's start (2s, -s), s = max|w| / 2: the uniform levels {-s, 0, s, 2s}, as their scales are to be trained."""
    return rows.new_tensor([1.0, -0.5]).expand(len(rows), 2)


def dual_start(rows: Tensor, bits: int, iterations: int = 12) -> Tensor:
    """(α1, α2) of the smallest squared error found, |α2| ≤ |α1|; a negative α1 mirrors the row.

    From several ranges and both orientations, assignment to the nearest level and the least squares of both scales
    take turns. With |α2| ≤ |α1| nearest is also what DB-LLM's rule for its two planes gives.
    """
    sorted_rows = SortedRows(rows)
    plain = dual_plain(rows, bits).double()
    found = []
    for share in (1.0, 0.7, 0.5, 0.35, 0.25):
        for sign in (1, -1):
            scales = plain * share * sign
            for _ in range(iterations):
                scales = _least_squares(sorted_rows, scales)
            found.append(scales / dual_levels(scales, bits).abs().amax(-1, keepdim=True).clamp(min=1))
    best = _best(sorted_rows, [plain, *found], lambda scales: dual_levels(scales, bits))
    swap = best[:, 1:].abs() > best[:, :1].abs()
    return torch.where(swap, best.flip(-1), best)


def _least_squares(rows: SortedRows, scales: Tensor) -> Tensor:
    """Both scales (R, 2) that fit best what is nearest to each of the four levels now."""
    levels, order = dual_levels(scales, 2).sort(dim=-1)
    count, total, _ = rows.cells(levels)
    back = order.argsort(dim=-1)
    (_, n2, n1, n12), (_, t2, t1, t12) = (t.gather(-1, back).unbind(-1) for t in (count, total))
    keep = 1e-9 * rows.rows.shape[1]  # a plane that nothing uses stays as it is
    first, second = scales.unbind(-1)
    a, b, c = n1 + n12 + keep, n12, n2 + n12 + keep
    x, y = t1 + t12 + keep * first, t2 + t12 + keep * second
    return torch.stack([c * x - b * y, a * y - b * x], dim=-1) / (a * c - b * b)[:, None]


# ------------------------------------------------------------------------------------------- grid and residual


def residual_levels(parameters: Tensor, bits: int) -> Tensor:
    """(lowest, step, α) -> lowest + k · step ± α for k < 2^(bits-1)."""
    lowest, step, size = (p.unsqueeze(-1) for p in parameters.unbind(-1))
    grid = lowest + step * torch.arange(1 << (bits - 1), device=parameters.device, dtype=parameters.dtype)
    return torch.cat([grid - size, grid + size], dim=-1)


def residual_start(rows: Tensor, bits: int, shrink: tuple[float, ...] = SHRINK) -> Tensor:
    """(lowest, step, α): of all shrunk ranges, that with the smallest error of grid and residual together.

    The grid is the affine one of bits - 1 bits with zero on it, and α = mean |w - grid| the best size of its residual.
    """
    sorted_rows = SortedRows(rows)
    tried = [_with_residual(sorted_rows, _affine(sorted_rows, bits - 1, share)) for share in shrink]
    return _best(sorted_rows, tried, lambda parameters: residual_levels(parameters, bits))


def _affine(rows: SortedRows, bits: int, share: float) -> Tensor:
    """The affine grid (R, 2^bits) with an integer zero point over a share of each row's range."""
    smallest, largest = rows.ends
    low, high = smallest.clamp(max=0) * share, largest.clamp(min=0) * share
    most = (1 << bits) - 1
    step = ((high - low) / most).clamp(min=1e-8)
    zero = (-low / step).round().clamp(0, most)
    return (torch.arange(1 << bits, device=step.device) - zero) * step


def _with_residual(rows: SortedRows, grid: Tensor) -> Tensor:
    """(lowest, step, α) of a grid (R, k); α = mean |w - nearest of the grid|, from both halves of each cell."""
    middles = (grid[:, 1:] + grid[:, :-1]) / 2
    borders = torch.stack([grid[:, :-1], middles], dim=-1).flatten(1)
    count, total, _ = rows.intervals(torch.cat([borders, grid[:, -1:]], dim=-1))
    below, above = (grid * count[:, i::2] - total[:, i::2] for i in (0, 1))
    size = (below - above).sum(-1) / rows.rows.shape[1]
    return torch.stack([grid[:, 0], grid[:, 1] - grid[:, 0], size], dim=-1)


# ------------------------------------------------------------------------------------------------- free levels


def lloyd_levels(parameters: Tensor, bits: int) -> Tensor:
    """The levels themselves."""
    return parameters


def lloyd_start(rows: Tensor, bits: int, others: list[Tensor], iterations: int = 30) -> Tensor:
    """The best levels that Lloyd's iterations find from the rows' quantiles and from other tables, (R or 1, 2^bits).

    An iteration never raises the error, so no table among the others has a smaller one.
    """
    sorted_rows = SortedRows(rows)
    found = []
    for start in [sorted_rows.quantiles(1 << bits), *others]:
        levels = start.double().expand(len(rows), -1)
        for _ in range(iterations):
            count, total, _ = sorted_rows.cells(levels)
            levels = torch.where(count > 0, total / count.clamp(min=1), levels)
        found.append(levels)
    return _best(sorted_rows, found, lambda levels: levels)


def _best(rows: SortedRows, found: list[Tensor], levels: Callable[[Tensor], Tensor]) -> Tensor:
    """Of several parameters (R, p), those with the smallest error, row by row."""
    best, smallest = found[0], rows.error(as_table(levels(found[0])))
    for parameters in found[1:]:
        error = rows.error(as_table(levels(parameters)))
        best = torch.where((error < smallest)[:, None], parameters, best)
        smallest = torch.minimum(error, smallest)
    return best
