"""Who leads: `attar` beside the best other system at every width, paired, and where it is not first by other measures.

Both the leaderboard of videos and those of pictures have it. Leading means mean PSNR. A variant of `attar` ("attar,
without branches") is no other system; the recipes `attar-ptq` and `attar-mixed` are, and so where one of them is the
best other, the best published one stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from attar.evaluate.statistics import Estimate
from benchmarks.ablations import Pairs, gain
from benchmarks.tables import estimate_text

OWN, VARIANT, RECIPES = "attar", "attar,", "attar-"
TITLE = "attar beside the best other system"
COLUMNS = ("bits", "against", "seeds", "PSNR of attar less its, dB", "interval", "linears, attar's and its")
SAID = """Leading means the highest mean PSNR. The difference is paired over the seeds that both have, with the 95 %
t-interval of the mean, or over prompts where there is one such seed, which says nothing of other seeds. An
interval that holds 0 shows no lead. Variants of attar are not counted as others. Where the best other is a
recipe of attar's own, the best published system stands below it.
"""


class Ranked(Protocol):
    """A row of a leaderboard. cells: by seed, in the order of `seeds`."""

    @property
    def system(self) -> str: ...
    @property
    def bits(self) -> str: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    @property
    def cells(self) -> tuple[dict[str, Any], ...]: ...
    @property
    def ratio(self) -> float: ...
    @property
    def psnr(self) -> float: ...


def paired(first: Ranked, second: Ranked) -> Pairs:
    """Their cells at the seeds that both have."""
    others = dict(zip(second.seeds, second.cells, strict=True))
    mine = zip(first.seeds, first.cells, strict=True)
    return [(cell, others[seed]) for seed, cell in mine if seed in others]


def rows(ranked: Sequence[Ranked]) -> list[list[str]]:
    """Figures in the order of COLUMNS."""
    found = []
    for own, others in _widths(ranked):
        best = others[0]
        chosen = [best]
        if best.system.startswith(RECIPES):
            chosen += [row for row in others if not row.system.startswith(RECIPES)][:1]
        for other in chosen:
            pairs = paired(other, own)
            change = gain(pairs) if pairs else None
            if change is not None:
                sizes = f"{own.ratio:.3f}×, {other.ratio:.3f}×"
                text = estimate_text(change, 2, "+")
                found.append([own.bits, other.system, str(len(pairs)), text, _sign(change), sizes])
    return found


def elsewhere(ranked: Sequence[Ranked]) -> str:
    """One sentence: where `attar` is not first by SSIM or by prompts that are all right, on the seeds of both."""
    said = []
    for what, value, digits in (("SSIM", _ssim, 4), ("prompts all right, in %,", _right, 1)):
        behind = [text for own, others in _widths(ranked) if (text := _behind(own, others, value, digits))]
        said.append(
            f"by {what} " + (f"it is not at {'; '.join(behind)}" if behind else "it is at every width")
        )
    return f"Is attar first by other measures too, on the seeds that both have? {'; '.join(said)}.".replace(
        "? by", "? By"
    )


def _widths(ranked: Sequence[Ranked]) -> list[tuple[Ranked, list[Ranked]]]:
    """(attar, the other systems, the best PSNR first) of every width that has both."""
    found = []
    for bits in dict.fromkeys(row.bits for row in ranked):
        here = [row for row in ranked if row.bits == bits]
        own = next((row for row in here if row.system == OWN), None)
        others = [row for row in here if row.system != OWN and not row.system.startswith(VARIANT)]
        if own is not None and others:
            found.append((own, sorted(others, key=lambda row: -row.psnr)))
    return found


def _behind(own: Ranked, others: list[Ranked], value: Callable[[dict[str, Any]], float], digits: int) -> str:
    """As in "W4A6 (attar-mixed 0.9946 for 0.9920)": the system that is furthest ahead; empty where none is."""
    ahead = []
    for other in others:
        sides = list(zip(*paired(own, other), strict=True))
        if sides:
            mine, its = (sum(map(value, side)) / len(side) for side in sides)
            ahead.append((its - mine, f"{own.bits} ({other.system} {its:.{digits}f} for {mine:.{digits}f})"))
    most, text = max(ahead, default=(0.0, ""))
    return text if most > 0.5 * 10.0**-digits else ""  # less is a tie in the tables too


def _ssim(cell: dict[str, Any]) -> float:
    return sum(cell["ssim"]) / len(cell["ssim"])


def _right(cell: dict[str, Any]) -> float:
    return 100 * (cell["accuracy"]["all"] if "accuracy" in cell else cell["right"])


def _sign(change: Estimate) -> str:
    if change.low is None or change.high is None:
        return "–"
    return "above 0" if change.low > 0 else "below 0" if change.high < 0 else "holds 0"
