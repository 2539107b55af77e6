"""Tables of the quality benchmark, from its results file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from attar.evaluate.statistics import Estimate, mean_interval, paired_difference
from benchmarks import bars
from benchmarks.cells import LEADERBOARD, STUDIES, Study, block_error, find_cell, seeds_of

INTRO = """# Quality on digits-video

Printed by `python -m benchmarks.quality --table` from `benchmarks/results/quality.json`; the cells are filled by
`python -m benchmarks.quality`. Every figure is paired with full precision: same prompts, same noise.

- **block error**: held-out squared error of a block's output relative to the block's own update, mean over blocks
- **on calibration samples**: the same error on the samples that the method saw; far below is over-fitting
- **latent error**: relative squared error of the final latents, median over prompts (a few prompts go another way in
  the first steps and would be most of a mean); **PSNR**, **SSIM**: of the videos, to full precision's
- **all right**: held-out prompts whose digit, colour, direction and speed are all shown (in brackets: full precision)
- ± is the half width of the 95 % t-interval over seeds; without it there is one seed only
- a figure that fewer seeds have than the row says how many: calibration that only took up what another cell had learned
  has no seconds, and some cells are older than a figure or were measured on blocks alone
"""


def write_tables(results: dict[str, Any], path: Path) -> str:
    """Writes all tables to `path` and returns them."""
    parts = [INTRO]
    if "environment" in results:
        e = results["environment"]
        parts.append(
            f"{e['steps']} steps, {e['device']}, "
            + ", ".join(f"{k} {v}" for k, v in e["versions"].items())
            + ".\n"
        )
    parts.append(bars.table(bars.check_bars(results["cells"])))
    for study in STUDIES.values():
        table = "" if study is LEADERBOARD else _study(study, results["cells"])  # which has a page of its own
        if table:
            parts.append(table)
    text = "\n".join(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return text


def _study(study: Study, cells: dict[str, Any]) -> str:
    rows = []
    for bits in study.bits:
        for method in study.at(bits):
            cell = {seed: find_cell(cells, study, method, bits, seed) for seed in seeds_of(cells)}
            found = {seed: c for seed, c in cell.items() if c is not None}
            if found:
                rows.append((f"W{bits[0]}A{bits[1]}", method.name, found))
    if not rows:
        return ""
    lines = [
        f"## {study.name}\n\n{study.question}\n",
        "| bits | method | seeds | block error | on calibration samples | latent error | PSNR dB | SSIM | all right "
        "| calibration CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for bits, name, found in rows:
        seeds = [found[s] for s in sorted(found)]
        lines.append(
            f"| {bits} | {name} | {len(seeds)} | {over_cells(seeds, block_error, 4)} | "
            f"{over_cells(seeds, _calibration, 4)} | {over_cells(seeds, _median_latent, 4)} | "
            f"{over_cells(seeds, _mean('psnr'), 2)} | {over_cells(seeds, _mean('ssim'), 4)} | {_accuracy(seeds)} | "
            f"{over_cells(seeds, lambda c: c.get('calibration_cpu_seconds'), 0)} |"
        )
    lines += _differences(study, rows) + _chosen(study, rows) + _temporal(study, rows)
    return "\n".join(lines) + "\n"


def _calibration(cell: dict[str, Any]) -> float | None:
    errors = [after for _, after in cell["calibration_errors"] if after is not None]
    return sum(errors) / len(errors) if errors else None


def _median_latent(cell: dict[str, Any]) -> float | None:
    return median(cell["latent_error"]) if "latent_error" in cell else None


def _mean(name: str) -> Any:
    return lambda cell: sum(cell[name]) / len(cell[name]) if name in cell else None


def over_cells(cells: Sequence[dict[str, Any]], value: Any, digits: int) -> str:
    """The mean of a figure over seeds with its interval; a dash where no cell has it, and how many have it where not
    all do, as in 1.23 ± 0.04 (2 seeds)."""
    found = [v for v in map(value, cells) if v is not None]
    return mean_text(found, digits) + seeds_text(len(found), len(cells))


def seeds_text(count: int, among: int) -> str:
    """ " (2 seeds)" for a figure of 2 cells in a row of more; nothing where it is of all or none."""
    return f" ({count} seed{'s' if count > 1 else ''})" if 0 < count < among else ""


def mean_text(values: Sequence[float], digits: int) -> str:
    """As in 1.23 ± 0.04; without the interval for one value, a dash for none."""
    return estimate_text(mean_interval(values), digits) if values else "–"


def estimate_text(e: Estimate, digits: int, sign: str = "") -> str:
    """As in 1.23 ± 0.04; without the interval where there is none. sign: "+" for that of a change."""
    return f"{e.mean:{sign}.{digits}f}" + ("" if e.high is None else f" ± {e.high - e.mean:.{digits}f}")


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _accuracy(cells: list[dict[str, Any]]) -> str:
    found = [c for c in cells if "accuracy" in c]
    if not found:
        return "–"
    share, full = (sum(c[k]["all"] for c in found) / len(found) for k in ("accuracy", "reference_accuracy"))
    return f"{100 * share:.1f} ({100 * full:.1f}){seeds_text(len(found), len(cells))}"


def _differences(study: Study, rows: list[tuple[str, str, dict[int, Any]]]) -> list[str]:
    """Against the study's first learned method, paired over seeds: the change of the block error in percent."""
    base = {
        "selection": "random",
        "distillation": "plain error",
        "learning": "default: 5 epochs, 40 samples, fp",
    }.get(study.name)
    reference = next((found for _, name, found in rows if name == base), None)
    if reference is None:
        return []
    lines = [
        f"\nChange of the held-out block error against *{base}*, paired over seeds, in percent: over all tokens, "
        "over the tenth that receives most attention, over the half that receives least.\n",
        "| | all tokens | most attended | least attended |",
        "|---|---|---|---|",
    ]
    for _, name, found in rows:
        seeds = sorted(set(found) & set(reference))
        if name == base or not seeds:
            continue
        changes = [_change([(reference[s], found[s]) for s in seeds], tokens) for tokens in TOKENS]
        lines.append(f"| {name} | {' | '.join(changes)} |")
    return lines


def _temporal(study: Study, rows: list[tuple[str, str, dict[int, Any]]]) -> list[str]:
    """How far the frames' similarities are from full precision's."""
    if study.needs != "temporal":
        return []
    lines = [
        "\nDivergence of the frames' similarities on held-out samples, times a million (Q-VDiT's temporal loss), mean "
        "over blocks:\n",
        "| bits | method | divergence |",
        "|---|---|---|",
    ]
    for bits, name, found in rows:
        values = over_cells(
            [found[s] for s in sorted(found)], lambda c: 1e6 * sum(c["temporal"]) / len(c["temporal"]), 1
        )
        lines.append(f"| {bits} | {name} | {values} |")
    return lines


TOKENS = ("block_errors", "most_attended", "least_attended")


def _change(pairs: list[tuple[dict[str, Any], dict[str, Any]]], tokens: str) -> str:
    """Percent by which the second cells' errors over some tokens are above the first ones'."""
    means = [[sum(c[tokens]) for c in pair] for pair in pairs if all(tokens in c for c in pair)]
    if not means:
        return "–"
    after = [100 * b / a for a, b in means]
    return estimate_text(paired_difference([100.0] * len(after), after), 1)


def _chosen(study: Study, rows: list[tuple[str, str, dict[int, Any]]]) -> list[str]:
    """Which steps each selection policy took, in tenths of the trajectory."""
    if study.name != "selection":
        return []
    lines = [
        "\nSamples by tenth of the trajectory (first seed):\n",
        "| policy | " + " | ".join(str(k) for k in range(1, 11)) + " | prompts |",
        "|---" * 12 + "|",
    ]
    for _, name, found in rows:
        cell = found[min(found)]
        steps = max(50, 1 + max(k for _, k in cell["chosen"]))
        tenths = Counter(k * 10 // steps for _, k in cell["chosen"])
        prompts = len({p for p, _ in cell["chosen"]})
        lines.append(
            f"| {name} | " + " | ".join(str(tenths.get(k, 0)) for k in range(10)) + f" | {prompts} |"
        )
    return lines
