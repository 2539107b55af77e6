"""The bits of every layer under a budget: the smallest summed error that it allows, or the smallest size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attar.budget.amount import Budget
from attar.budget.solve import choose
from attar.errors import AttarError


@dataclass(frozen=True)
class Candidate:
    """One layer at one width. size: packed bytes. error: of its block when this layer alone is quantized."""

    bits: int
    size: int
    error: float


@dataclass(frozen=True)
class Layer:
    """A quantized layer. weights: how many. dense: bytes in bfloat16. uniform: at the recipe's own bits.

    candidates: what may be chosen; one alone for a layer whose bits the recipe names.
    """

    name: str
    weights: int
    dense: int
    uniform: Candidate
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Totals:
    """Of a choice: packed bytes, their share of bfloat16, mean bits of a weight, and the summed error."""

    size: int
    ratio: float
    bits: float
    error: float


def choose_bits(layers: Sequence[Layer], budget: Budget) -> list[Candidate]:
    """One candidate for each layer.

    For a size or mean bits it is the choice with the smallest sum of errors that keeps to the budget; for a loss, the
    smallest one of those whose sum of errors is at most 10^(dB/10) times that of the recipe's own bits. Exact.
    Raises AttarError where no choice keeps to the budget.
    """
    errors = [[c.error for c in layer.candidates] for layer in layers]
    costs = [[_cost(layer, c, budget) for c in layer.candidates] for layer in layers]
    if budget.kind == "size":
        found = choose(errors, costs, math.floor(budget.value * sum(layer.dense for layer in layers)))
    elif budget.kind == "bits":
        found = choose(errors, costs, budget.value * sum(layer.weights for layer in layers) * (1 + 1e-12))
    else:
        found = choose(costs, errors, _allowed(layers, budget) * (1 + 1e-9))
    if found is None:
        raise AttarError(
            f"no plan keeps to the budget {budget}", where="budget", fix=_nearest(layers, budget)
        )
    return [layer.candidates[k] for layer, k in zip(layers, found, strict=True)]


def choose_within(
    layers: Sequence[Layer], groups: Sequence[str], taken: Sequence[Candidate], budget: Budget
) -> list[Candidate]:
    """One candidate for each layer, such that every group of layers costs no more than with the candidates `taken` and
    the sum of its errors is the smallest. Exact. (ViDiT-Q, arXiv 2406.02540: each group has a metric of its own.)

    groups: of each layer. taken: of each layer, with the same widths; their errors may be others. budget: of a size or
    of mean bits, which says what costs are.
    """
    chosen = list(taken)
    for group in dict.fromkeys(groups):
        mine = [i for i, g in enumerate(groups) if g == group]
        errors = [[c.error for c in layers[i].candidates] for i in mine]
        costs = [[_cost(layers[i], c, budget) for c in layers[i].candidates] for i in mine]
        found = choose(errors, costs, sum(_cost(layers[i], taken[i], budget) for i in mine))
        assert found is not None  # `taken` is such a choice
        for i, k in zip(mine, found, strict=True):
            chosen[i] = layers[i].candidates[k]
    return chosen


def totals(layers: Sequence[Layer], chosen: Sequence[Candidate]) -> Totals:
    """What a choice comes to."""
    size = sum(c.size for c in chosen)
    dense = sum(layer.dense for layer in layers)
    return Totals(size, size / dense, mean_bits(layers, chosen), math.fsum(c.error for c in chosen))


def mean_bits(layers: Sequence[Layer], chosen: Sequence[Candidate]) -> float:
    """Of a weight."""
    codes = sum(layer.weights * c.bits for layer, c in zip(layers, chosen, strict=True))
    return codes / sum(layer.weights for layer in layers)


def _cost(layer: Layer, candidate: Candidate, budget: Budget) -> float:
    """In a budget's unit; for a loss, whose budget is one of errors, the bytes that are to be few."""
    return float(candidate.bits * layer.weights if budget.kind == "bits" else candidate.size)


def _allowed(layers: Sequence[Layer], budget: Budget) -> float:
    return math.fsum(layer.uniform.error for layer in layers) * 10 ** (budget.value / 10)


def _nearest(layers: Sequence[Layer], budget: Budget) -> str:
    """What the candidates can give at most."""
    least = totals(layers, [min(layer.candidates, key=lambda c: c.size) for layer in layers])
    if budget.kind == "loss":
        best = math.fsum(min(c.error for c in layer.candidates) for layer in layers)
        uniform = math.fsum(layer.uniform.error for layer in layers)
        reach = 10 * math.log10(best / uniform) if best > 0 < uniform else -math.inf
        return f"The candidates reach {reach:.2f}dB; allow more, or add wider ones (allocate.bits)"
    reach = f"{math.ceil(1000 * least.ratio) / 1000:g}x" if budget.kind == "size" else f"{least.bits:.2f}bits"
    return f"The narrowest candidates come to {reach}; allow more, or add narrower ones (allocate.bits)"
