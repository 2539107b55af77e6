"""Training data: scikit-learn's handwriting, split by sample, drawn as clips or as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn

from attar.models.zoo.clips import random_clips
from attar.models.zoo.pictures import random_pictures

SEED = 20


def handwriting() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits: (train scans (N, 8, 8) in [0, 1], labels, held-out scans, labels), split by sample."""
    from sklearn.datasets import load_digits

    data = load_digits()
    scans = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(scans), generator=torch.Generator().manual_seed(SEED))
    held_out, train = order[:360], order[360:]
    return scans[train], labels[train], scans[held_out], labels[held_out]


class Drawings:
    """Random drawings of one split, made on the device. wanted: what they may show, the digit first."""

    def __init__(self, scans: Tensor, labels: Tensor, wanted: Sequence[Any], device: torch.device) -> None:
        self.scans = scans.to(device)
        self.wanted = list(wanted)
        self.table = torch.tensor([astuple(w) for w in wanted], device=device)
        by_digit = [(labels == d).nonzero()[:, 0].to(device) for d in range(10)]
        self.count = torch.tensor([len(b) for b in by_digit], device=device)
        self.index = nn.utils.rnn.pad_sequence(by_digit, batch_first=True)  # (10, longest)

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """(rows of the table (B,), drawings in [0, 1])."""
        return self.draw_rows(torch.randint(len(self.table), (batch,), device=self.table.device))

    def draw_rows(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """The same for given rows of the table."""
        digit, *others = self.table[row].T
        which = (torch.rand(len(row), device=row.device) * self.count[digit]).long()
        return row, self.render(self.scans[self.index[digit, which]], *others)

    def render(self, scans: Tensor, *others: Tensor) -> Tensor:
        raise NotImplementedError


class Scenes(Drawings):
    """Random clips (B, 3, F, H, W) of scenes."""

    def render(self, scans: Tensor, *others: Tensor) -> Tensor:
        return random_clips(scans, *others)


class Pictures(Drawings):
    """Random pictures (B, 3, H, W)."""

    def render(self, scans: Tensor, *others: Tensor) -> Tensor:
        return random_pictures(scans, *others)
