"""Wall-clock times of things side by side, in turns, so that other load on the machine touches all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from attar.errors import AttarError
from attar.runtime.clock import now


@dataclass(frozen=True)
class Ratio:
    """How many times faster: the ratio of medians, and the quartiles of the ratios of single rounds."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every round of every run, after one round that is not counted.

    Each round runs all of them once, in an order that turns by one from round to round. On CUDA a run ends when the
    device is done. Raises AttarError for fewer than 3 rounds, which have no spread.
    """
    if rounds < 3:
        raise AttarError(f"{rounds} rounds have no spread", fix="Measure at least 3")
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            started = now(device)
            runs[name]()
            taken = now(device) - started
            if turn:
                seconds[name].append(taken)
    return seconds


def faster(baseline: Sequence[float], other: Sequence[float]) -> Ratio:
    """How many times faster `other` is than `baseline`; both are seconds of the same rounds.

    Raises AttarError when the numbers of rounds differ.
    """
    if len(baseline) != len(other) or not baseline:
        raise AttarError(f"{len(baseline)} and {len(other)} rounds cannot be paired")
    a, b = np.asarray(baseline, dtype=float), np.asarray(other, dtype=float)
    low, high = np.quantile(a / b, [0.25, 0.75])
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))
