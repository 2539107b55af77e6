"""The bars that quantization of digits-video has to clear, checked against the benchmark's results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from attar.evaluate.statistics import Estimate, paired_difference
from benchmarks.cells import (
    ACCURACY,
    CLIPPING,
    LADDER,
    MAIN,
    OUTLIERS,
    SELECTION,
    Study,
    block_error,
    find_cell,
    seeds_of,
)

Cells = dict[str, Any]
Value = Callable[[dict[str, Any]], float]
DEFAULT, FAITHFUL = "attar (default)", "S²Q-VDiT (with GPTQ)"
HARMLESS = 5  # percent
UNLEARNED = ("round to nearest", "SmoothQuant", "Hadamard (QuaRot-style)")


@dataclass(frozen=True)
class Verdict:
    """One bar. holds: None when its cells are not measured yet."""

    bar: str
    holds: bool | None
    measured: str


def check_bars(cells: Cells) -> list[Verdict]:
    """Every bar, from the cells that are there."""
    checks = (_accuracy, _closeness, _order, _every_block, _clipping, _control, _gain)
    return [verdict for check in checks for verdict in check(cells)]


def table(verdicts: list[Verdict]) -> str:
    said = {True: "holds", False: "**fails**", None: "not measured"}
    lines = ["## Bars\n", "| bar | | measured |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {v.bar} | {said[v.holds]} | {v.measured} |" for v in verdicts)]) + "\n"


def _accuracy(cells: Cells) -> Iterator[Verdict]:
    for name in (DEFAULT, FAITHFUL):
        bar = f"W4A6, {name}: prompt accuracy within 1 point of full precision"
        share, full, prompts = prompts_right(cells, name)
        measured = f"{100 * share:.1f} % of {prompts} prompts against {100 * full:.1f} %"
        yield Verdict(bar, share >= full - 0.01 if prompts else None, measured if prompts else "")


def prompts_right(cells: Cells, name: str) -> tuple[float, float, int]:
    """Of the study of accuracy: the share of prompts that are all right, full precision's, and how many prompts."""
    found = _cells(cells, ACCURACY, name, (4, 6))
    prompts = sum(c["prompts"] for c in found.values())
    share, full = (
        sum(c[kind]["all"] * c["prompts"] for c in found.values()) / max(prompts, 1)
        for kind in ("accuracy", "reference_accuracy")
    )
    return share, full, prompts


def _closeness(cells: Cells) -> Iterator[Verdict]:
    for name in (DEFAULT, FAITHFUL):
        for other in UNLEARNED:
            gain = _paired(cells, MAIN, (4, 6), other, name, _psnr)
            yield _above(f"W4A6, {name}: PSNR above {other}", gain, 0, "dB")


def _order(cells: Cells) -> Iterator[Verdict]:
    for study in (LADDER, OUTLIERS):
        rungs = [method.name for method in study.methods]
        for worse, better in itertools.pairwise(rungs):
            change = _paired(cells, study, (4, 4), worse, better, _percent(cells, study, (4, 4), worse))
            yield _below(f"W4A4, {study.name}: block error of *{worse}* > *{better}*", change)


def _every_block(cells: Cells) -> Iterator[Verdict]:
    before, after = (
        _cells(cells, LADDER, name, (4, 4)) for name in ("scaling + rotation", "+ learned scale")
    )
    pairs = [
        (a, b)
        for seed in sorted(set(before) & set(after))
        for a, b in zip(before[seed]["block_errors"], after[seed]["block_errors"], strict=True)
    ]
    better = sum(b < a for a, b in pairs)
    bar = "W4A4, ladder: learning lowers the held-out error of every block"
    yield Verdict(bar, better == len(pairs) if pairs else None, f"{better} of {len(pairs)} blocks and seeds")


def _clipping(cells: Cells) -> Iterator[Verdict]:
    plain, learned = (method.name for method in CLIPPING.methods)
    for bits in CLIPPING.bits:
        change = _paired(cells, CLIPPING, bits, plain, learned, _percent(cells, CLIPPING, bits, plain))
        name = f"W{bits[0]}A{bits[1]}, clipping"
        if bits == (4, 4):
            yield _below(f"{name}: block error of *{plain}* > *{learned}*", change)
        else:
            holds = None if change is None else change.mean < HARMLESS
            yield Verdict(
                f"{name}: learned clipping does no harm (below +{HARMLESS} %)", holds, _said(change, "%")
            )


def _control(cells: Cells) -> Iterator[Verdict]:
    change = _paired(cells, SELECTION, (4, 4), "salient", "lowest", lambda cell: median(cell["latent_error"]))
    bar = "W4A4, selection: the lowest scores give a larger final-latent error than the highest"
    yield Verdict(bar, None if change is None else change.mean > 0, _said(change, "", digits=4))


def _gain(cells: Cells) -> Iterator[Verdict]:
    for name in (DEFAULT, FAITHFUL):
        gain = _paired(cells, MAIN, (4, 4), "round to nearest", name, _psnr)
        yield _above(f"W4A4, {name}: at least 3 dB PSNR over round to nearest", gain, 3, "dB")


def _cells(cells: Cells, study: Study, name: str, bits: tuple[int, int]) -> dict[int, dict[str, Any]]:
    method = next(m for m in study.methods if m.name == name)
    found = {seed: find_cell(cells, study, method, bits, seed) for seed in seeds_of(cells)}
    return {seed: cell for seed, cell in found.items() if cell is not None}


def _paired(
    cells: Cells, study: Study, bits: tuple[int, int], before: str, after: str, value: Value
) -> Estimate | None:
    """after − before over the seeds that both have."""
    first, second = (_cells(cells, study, name, bits) for name in (before, after))
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    return paired_difference([value(first[s]) for s in seeds], [value(second[s]) for s in seeds])


def _psnr(cell: dict[str, Any]) -> float:
    return sum(cell["psnr"]) / len(cell["psnr"])


def _percent(cells: Cells, study: Study, bits: tuple[int, int], reference: str) -> Value:
    """The block error in percent of the mean one of `reference`."""
    found = _cells(cells, study, reference, bits)
    mean = sum(map(block_error, found.values())) / max(len(found), 1)
    return lambda cell: 100 * block_error(cell) / mean


def _above(bar: str, gain: Estimate | None, least: float, unit: str) -> Verdict:
    return Verdict(bar, None if gain is None else gain.mean > least, _said(gain, unit, least))


def _below(bar: str, change: Estimate | None) -> Verdict:
    return Verdict(bar, None if change is None else change.mean < 0, _said(change, "%"))


def _said(e: Estimate | None, unit: str, least: float = 0, digits: int = 2) -> str:
    if e is None:
        return ""
    interval = "" if e.high is None else f" ± {e.high - e.mean:.{digits}f}"
    noise = (
        ", in the mean only" if e.low is not None and e.high is not None and e.low < least < e.high else ""
    )
    return f"{e.mean:+.{digits}f}{interval}{unit and ' '}{unit}, {e.count} seed{'s' if e.count > 1 else ''}{noise}"
