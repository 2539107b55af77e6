"""docs/peers.md: quality and speed of every competitor, and two pictures, from the results file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.scatter import Point, scatter

INTRO = """# attar beside other libraries

`python -m benchmarks.peers` measures and writes this page from `benchmarks/results/peers.json`; the other libraries
come with `pip install -e '.[peers]'`, and `--part table` only writes the page. Every library quantizes the linears of
the transformer blocks and nothing else, with its own defaults for the format; those that calibrate get the same
full-precision calls. A library that fails is shown with its error. *Simulated* means that it computes in
floating point what other machines' kernels would compute in integers, so its speed and memory say nothing.
"""


def write_table(results: dict[str, Any], path: Path) -> str:
    """Writes the page, with its pictures in `images` beside it, and returns it."""
    parts = [INTRO]
    if results["quality"]:
        parts.append(_quality(results["quality"]))
    for name, (picture, said) in pictures(results).items():
        image = path.parent / "images" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_text(picture, encoding="utf-8")
        parts.append(f"![{said}](images/{name})\n")
    parts += [_speed(title, study) for title, study in results["speed"].items()]
    text = "\n".join(parts)
    path.write_text(text, encoding="utf-8")
    return text


def pictures(results: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """File name -> (SVG, what it shows): quality against size, and against the latency of the first measured block.

    Competitors that failed, and full precision itself, whose PSNR is infinite, are in neither.
    """
    quality = {
        name: row for name, row in results["quality"].items() if math.isfinite(row.get("psnr", math.inf))
    }
    title, study = next(iter(results["speed"].items()), ("", {"rows": {}}))
    plots = {
        "peers-size.svg": (
            "Quality against size",
            "MB of the block linears of digits-video",
            {n: row["bytes"] / 1e6 for n, row in quality.items() if row["bytes"] is not None},
        ),
        "peers-latency.svg": (
            "Quality against latency",
            f"ms of one block: {title}",
            {
                n: 1000 * row["seconds"]
                for n, row in study["rows"].items()
                if n in quality and "seconds" in row
            },
        ),
    }
    found = {}
    for name, (heading, label, across) in plots.items():
        points = [Point(x, quality[n]["psnr"], n, _library(quality[n])) for n, x in across.items()]
        if points:
            found[name] = (scatter(points, heading, label, "PSNR to fp32, dB"), heading)
    return found


def _library(row: dict[str, Any]) -> str:
    return row["version"].partition(" ")[0]


def _quality(rows: dict[str, Any]) -> str:
    lines = [
        "## Quality on digits-video\n",
        "The same held-out prompts and noise for all, 50 steps; PSNR and SSIM are to the videos of fp32.\n",
        "| | version | PSNR dB | SSIM | prompts right (fp32) | block linears | seconds to quantize |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = rows.get("bf16", {}).get("bytes")
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | {row['version']} | {_plain(row['error'])} |||||")
            continue
        right, full = row["accuracy"]["all"], row["reference_accuracy"]["all"]
        lines.append(
            f"| {name} | {row['version']} | {_decibels(row['psnr'])} | {row['ssim']:.4f} | "
            f"{100 * right:.1f} ({100 * full:.1f}) | {_size(row['bytes'], whole)} | "
            f"{row['seconds_to_quantize']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _speed(title: str, study: dict[str, Any]) -> str:
    lines = [
        f"## Speed of one block: {title}\n",
        f"{study['device']}, {study['threads']} thread{'s' if study['threads'] > 1 else ''}, "
        f"{study['rounds']} rounds in turns; the ratio of medians, "
        "in brackets the middle half of the ratios of single rounds, which need not hold it.\n",
        "| | ms | times faster than bf16 | block linears |",
        "|---|---|---|---|",
    ]
    whole = study["rows"].get("bf16", {}).get("bytes")
    for name, row in study["rows"].items():
        if "error" in row:
            lines.append(f"| {name} | {_plain(row['error'])} |||")
            continue
        f = row.get("faster")
        ratio = "–" if f is None else f"{f['value']:.2f} ({f['low']:.2f} – {f['high']:.2f})"
        lines.append(f"| {name} | {1000 * row['seconds']:.0f} | {ratio} | {_size(row['bytes'], whole)} |")
    return "\n".join(lines) + "\n"


def _size(size: int | None, whole: int | None) -> str:
    if size is None:
        return "simulated"
    return f"{size / 1e6:.1f} MB" + ("" if not whole else f" ({size / whole:.3f}×)")


def _decibels(value: float) -> str:
    return "∞" if value == float("inf") else f"{value:.2f}"


def _plain(error: str) -> str:
    return error.replace("|", "/")[:160]
