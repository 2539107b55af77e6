"""The multiple-choice knapsack problem, solved exactly: one option of every group, under a limit.

Dynamic programming over the groups keeps the partial choices that no other one beats in both value and weight. What
bounds their number is the linear relaxation (Sinha and Zoltners 1979): its optimum over the groups that are left is the
convex hulls of their options taken steepest first, so a partial choice that cannot beat a known one even with that is
dropped. Weights need not be integers, and nothing is rounded to a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
ROUNDING = 1e-12  # relative, of sums taken in another order


@dataclass(frozen=True)
class _Relaxed:
    """Least sum of values of some groups as a function of the weight they may have, fractions of options allowed.

    weights, values: (P,) corners of that function, which is convex and falls.
    """

    weights: Numbers
    values: Numbers

    def at(self, room: Numbers) -> Numbers:
        return np.interp(room, self.weights, self.values)


def choose(
    values: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], limit: float
) -> list[int] | None:
    """The option of each group whose values add up to least while the weights add up to at most `limit`.

    values, weights: of every option of every group, finite; sums of integer weights are exact below 2⁵³. Among equal
    values the lighter choice is taken. Returns indices, or None where even the lightest options are too heavy.
    """
    groups = [
        _worthwhile(np.asarray(v, float), np.asarray(w, float)) for v, w in zip(values, weights, strict=True)
    ]
    lightest = sum(weight[0] for _, weight, _ in groups)
    if lightest > limit:
        return None
    relaxed = _relaxations(groups)
    known = _greedy(groups, limit)
    known += ROUNDING * sum(np.abs(value).max() for value, _, _ in groups)
    value, weight = np.zeros(1), np.zeros(1)
    steps: list[tuple[NDArray, NDArray]] = []
    for (more_value, more_weight, _), rest in zip(groups, relaxed[1:], strict=True):
        value = (value[:, None] + more_value).ravel()
        weight = (weight[:, None] + more_weight).ravel()
        room = limit - weight
        kept = np.flatnonzero((room >= rest.weights[0] * (1 - ROUNDING)) & (value + rest.at(room) <= known))
        if not kept.size:  # the lightest options fit only in another order of summing
            return None
        kept = kept[np.lexsort((value[kept], weight[kept]))]
        best = np.minimum.accumulate(value[kept])
        kept = kept[np.concatenate(([True], value[kept][1:] < best[:-1]))]
        value, weight = value[kept], weight[kept]
        steps.append(np.divmod(kept, len(more_value)))
    place = int(value.argmin())
    chosen = []
    for (parent, option), (_, _, index) in zip(reversed(steps), reversed(groups), strict=True):
        chosen.append(int(index[option[place]]))
        place = int(parent[place])
    return chosen[::-1]


def _worthwhile(value: Numbers, weight: Numbers) -> tuple[Numbers, Numbers, NDArray]:
    """The options that none beats, by rising weight, with their indices."""
    order = np.lexsort((value, weight))
    best = np.minimum.accumulate(value[order])
    order = order[np.concatenate(([True], value[order][1:] < best[:-1]))]
    return value[order], weight[order], order


def _hull(value: Numbers, weight: Numbers) -> list[int]:
    """The corners of the lower convex hull."""
    corners: list[int] = []
    for k in range(len(value)):
        while len(corners) > 1:
            i, j = corners[-2:]
            if (value[j] - value[i]) * (weight[k] - weight[i]) < (value[k] - value[i]) * (
                weight[j] - weight[i]
            ):
                break
            corners.pop()
        corners.append(k)
    return corners


def _relaxations(groups: Sequence[tuple[Numbers, Numbers, NDArray]]) -> list[_Relaxed]:
    """Of all groups, of all but the first, …, of none."""
    rises, falls = np.zeros(0), np.zeros(0)
    weight, value = 0.0, 0.0
    found = [_Relaxed(np.zeros(1), np.zeros(1))]
    for more_value, more_weight, _ in reversed(groups):
        corners = _hull(more_value, more_weight)
        rises = np.concatenate((rises, np.diff(more_weight[corners])))
        falls = np.concatenate((falls, np.diff(more_value[corners])))
        order = np.argsort(falls / rises, kind="stable")
        rises, falls = rises[order], falls[order]
        weight, value = weight + more_weight[0], value + more_value[0]
        found.append(
            _Relaxed(
                np.concatenate(([weight], weight + np.cumsum(rises))),
                np.concatenate(([value], value + np.cumsum(falls))),
            )
        )
    return found[::-1]


def _greedy(groups: Sequence[tuple[Numbers, Numbers, NDArray]], limit: float) -> float:
    """The value of a choice that fits: hulls taken steepest first, a group being left where a step is too heavy."""
    weight = sum(w[0] for _, w, _ in groups)
    value = sum(v[0] for v, _, _ in groups)
    moves = []
    for group, (v, w, _) in enumerate(groups):
        corners = _hull(v, w)
        for i, j in pairwise(corners):
            moves.append(((v[j] - v[i]) / (w[j] - w[i]), group, w[j] - w[i], v[j] - v[i]))
    full = set()
    for _, group, more_weight, more_value in sorted(moves):
        if group in full or weight + more_weight > limit:
            full.add(group)
        else:
            weight, value = weight + more_weight, value + more_value
    return float(value)
