"""Auxiliary branches that fade while a model is trained: half of their rank in each phase, until none is left.

QVGen (arXiv 2505.11497): the directions of small singular values fade by a cosine, are cut off, and the rest is
decomposed anew, so that the next phase again fades what matters least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attar.errors import AttarError
from attar.quantize.linear import QuantizedLinear
from attar.quantize.terms import LowRankTerm


@dataclass(frozen=True)
class RankDecay:
    """rank: at the start, the same in all layers, cut to what a layer has. steps: of the whole training.

    keep: share of the rank that a phase leaves, rounded down, so 1/2 visits 32, 16, 8, 4, 2, 1, 0.
    """

    rank: int
    steps: int
    keep: float = 0.5

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.keep < 1:
            raise AttarError(f"a rank of {self.rank} cannot decay to {self.keep:g} of it in each phase")
        if self.length < 1:
            raise AttarError(
                f"{self.steps} steps are too few for {len(self.ranks) - 1} phases of rank decay",
                where="finetune.steps",
                fix="Train longer, or start with a smaller rank",
            )

    @property
    def ranks(self) -> list[int]:
        """The ranks that are visited, the last one 0."""
        found = [self.rank]
        while found[-1]:
            found.append(int(found[-1] * self.keep))
        return found

    @property
    def length(self) -> int:
        """Steps of a phase; the few that are left over run at the end, without branches."""
        return self.steps // (len(self.ranks) - 1)

    def at(self, step: int) -> tuple[int, int, float]:
        """(rank, directions that stay, share of the others) in a step, counted from 0. Rank 0 behind the last phase."""
        phase, place = divmod(step, self.length)
        if phase >= len(self.ranks) - 1:
            return 0, 0, 0.0
        return self.ranks[phase], self.ranks[phase + 1], (1 + math.cos(math.pi * place / self.length)) / 2


@torch.no_grad()
def start_auxiliary(layers: Mapping[str, QuantizedLinear], rank: int) -> None:
    """Gives every layer the branch that starts as the leading part of what rounding takes from its weight."""
    for layer in layers.values():
        weight = layer.transformed_weight()
        layer.auxiliary = LowRankTerm.leading(weight - layer.rounded(weight), min(rank, *weight.shape))


def decay(layers: Mapping[str, QuantizedLinear], schedule: RankDecay, step: int) -> bool:
    """Sets all branches as they are in a step. Returns whether their parameters are other objects than before."""
    rank, keep, share = schedule.at(step)
    changed = False
    for layer in layers.values():
        term = layer.auxiliary
        if term is None:
            continue
        if rank == 0:
            layer.auxiliary, changed = None, True
            continue
        if term.rank > rank:
            term.truncate(rank)
            changed = True
        term.fade(min(keep, term.rank), share)
    return changed
