"""The relation term of a training run: its settings, the memory of the teacher's places, the value of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from attar.errors import AttarError
from attar.losses.relation import direction_distance, memory_divergence, relation_divergence, smoothed
from attar.quantize.batching import Streams
from attar.quantize.seeds import seed_of

FEATURES = "relation"  # the stream of the features (B, N, C) in what a model gives
KINDS = ("divergence", "direction")


@dataclass(frozen=True)
class RelationSettings:
    """weight: of the mean divergence, beside the mean squared error. window: consecutive denoising steps whose features
    are averaged; 1 for none. temperature: of the softmax over cosines. memory: rows of the teacher's places from all
    traced steps that places are compared with, `anchors` of them at a time; 0 compares the places of a sample with one
    another. places: the most of a sample that are compared with one another, spread evenly. kind: "divergence", of the
    softmax over cosines, or "direction", the distance of the directions of Z Zᵀ, without temperature and memory.
    Raises AttarError for another kind, and for a direction with a memory.
    """

    weight: float
    window: int = 2
    temperature: float = 1.0
    memory: int = 0
    anchors: int = 4096
    places: int = 1024
    kind: str = "divergence"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AttarError(f"there is no relation {self.kind!r}", fix=f"Use {', '.join(KINDS)}")
        if self.kind == "direction" and self.memory:
            raise AttarError(
                "directions compare places of a sample with one another, and not with a memory",
                where="finetune.relation",
                fix="Set memory to 0",
            )


@dataclass(frozen=True)
class RelationTerm:
    """weight · divergence or distance of a batch's relations. memory: (K, C), as `draw_memory` makes it, or None."""

    settings: RelationSettings
    memory: Tensor | None = None
    seed: str = "0"

    def __call__(self, pred: Tensor, target: Tensor, steps: int, update: int) -> Tensor:
        """pred, target: (steps · B, N, C), step after step. update: its number; it decides which rows of the memory are
        looked at. Returns a scalar."""
        chosen = self.settings
        stride = -(-pred.shape[1] // chosen.places)
        ours, full = (smoothed(f[:, ::stride], steps, chosen.window) for f in (pred, target))
        if chosen.kind == "direction":
            return chosen.weight * direction_distance(ours, full)
        if self.memory is None:
            return chosen.weight * relation_divergence(ours, full, chosen.temperature)
        generator = torch.Generator().manual_seed(seed_of(self.seed, "anchors", str(update)))
        rows = torch.randperm(len(self.memory), generator=generator)[: chosen.anchors]
        anchors = self.memory[rows].to(pred.device)
        return chosen.weight * memory_divergence(ours, full, anchors, chosen.temperature)


def draw_memory(samples: Sequence[tuple[Any, Streams]], rows: int, seed: str) -> Tensor:
    """Places of the teacher, as many from every traced step: (about `rows`, C), normalised, float32, on the CPU.

    samples: with the stream FEATURES (B, N, C) among what the original gave. All steps are known here, so the memory is
    full and balanced over time from the first update on, which MPQ-DMv2's queue is once it has seen a trajectory, and
    it holds all guidance branches evenly.
    Raises AttarError for fewer rows than samples.
    """
    each = rows_of_each(rows, len(samples))
    generator = torch.Generator().manual_seed(seed_of(seed, "memory"))
    found = []
    for _, streams in samples:
        places = streams[FEATURES].flatten(0, -2)
        found.append(places[torch.randint(len(places), (each,), generator=generator)].float())
    return normalize(torch.cat(found), dim=-1)


def rows_of_each(rows: int, samples: int) -> int:
    """How many rows of a memory each sample has. Raises AttarError for fewer rows than samples."""
    if rows < samples:
        raise AttarError(
            f"a memory of {rows} places is smaller than the {samples} traced steps",
            where="finetune.relation.memory",
            fix="Choose a larger one",
        )
    return rows // samples


def windows(places: Sequence[tuple[int, ...]], length: int) -> list[list[int]]:
    """Indices of consecutive steps, `length` at a time, that do not overlap; a rest that fills no window is left out.

    places: (prompt, step, …) of every sample; windows stay within one prompt, and within what else tells them apart.
    Raises AttarError where none is as long as a window.
    """
    runs: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, _, *rest) in enumerate(places):
        runs.setdefault((prompt, *rest), []).append(index)
    found = [
        run[start : start + length]
        for run in runs.values()
        for start in range(0, len(run) - length + 1, length)
    ]
    if not found:
        raise AttarError(
            f"no prompt has as many traced steps as a window, {length}",
            where="finetune.relation.window",
            fix="Trace more steps, or average over fewer",
        )
    return found
