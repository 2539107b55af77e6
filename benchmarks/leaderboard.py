"""All systems under one protocol: `python -m benchmarks.leaderboard`.

    python -m benchmarks.leaderboard --bits W4A6 W4A4 W3A6      fill these rows (minutes each), then write the pages
    python -m benchmarks.leaderboard --models digits-dit --only svdquant --seeds 0
    python -m benchmarks.leaderboard --table                    only write the pages

Without `--models` all built-in models are filled, those of pictures by `python -m benchmarks.pictures`, whose page is
written too. Rows of videos are cells of the study "leaderboard" of `python -m benchmarks.quality`, with which it
shares its results file: what another study has measured already is not measured again. docs/leaderboard.md has the
tables, docs/leaderboard.html the same beside the plot of quality against size, and the models of `python -m
benchmarks.pictures` too. The peers of `python -m benchmarks.peers` are among them, and what the parts of the systems
give (`benchmarks.ablations`).
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import torch

from attar.models.source import find_source, load_pipeline
from benchmarks import ablations, bars, latency, leading, picture_parts, pictures, quality
from benchmarks.cells import LEADERBOARD, block_error, find_cell, seeds_of
from benchmarks.scatter import Point, scatter
from benchmarks.sizes import planned_ratio
from benchmarks.store import FOLDER, load
from benchmarks.tables import over_cells, table_lines

DOCS = Path(__file__).parent.parent / "docs"
PEERS = FOLDER / "peers.json"
VIDEOS = "digits-video"
COLUMNS = (
    "system", "seeds", "linears", "PSNR dB", "SSIM", "latent error", "block error", "Fréchet distance", "all right",
    "calibration CPU s", "block speed",
)  # fmt: skip
INTRO = """Every system compresses the same model with the same calibration prompts, and is measured on the same 24
held-out prompts with the same noise as full precision, 50 steps. Printed by `python -m benchmarks.leaderboard --table`.

- **linears**: bytes of the quantized linears against bfloat16, with scales, transforms, tables and branches
- **PSNR**, **SSIM**: of the videos to full precision's; **latent error**: relative squared error of the final latents,
  median over prompts; **block error**: of each block on held-out full-precision inputs, relative to its own update
- **Fréchet distance**: between what the digit reader sees in the frames of both models; small sets are biased upwards
- **all right**: prompts whose digit, colour, direction and speed are all shown (in brackets: full precision); one
  prompt is 4 points, or 1.4 over three seeds, so a loss of a point cannot be seen here
- **block speed**: one block of Wan 1.3B at 2,048 tokens on one core of a Xeon with AMX, times faster than bfloat16,
  which uses AMX too, in the same run: the ratio of medians, and the quartiles of single rounds' ratios, which need not
  hold it (`python -m benchmarks.latency`); tables of numbers have no kernels on CPUs
- ± is the half width of the 95 % t-interval over seeds; rows of one seed are no more than a hint
- `lrq-dit` is larger than bfloat16 at eight bits: its codes have eight bits, but every row brings a table of its own of
  2^8 numbers of two bytes, as much as a row of 256 weights in bfloat16
- `attar-mixed` is `attar-ptq` at two bits, the least there are, and at eight, the most: there is nothing to mix
- the line in the plot is the Pareto frontier: no system or library lies left of it and above it, at any width
- `vidit-q` has the same bits in every layer; `vidit-q, mixed by metrics` is its mixed precision, with a metric for
  each group of layers
- a figure that fewer seeds have than the row says how many: calibration that only took up what another cell had learned
  has no seconds, and some cells are older than the Fréchet distance
"""


OTHERS = """The models of pictures have [tables of their own](pictures.md); [one page](leaderboard.html) has all models.
"""


@dataclass(frozen=True)
class Section:
    """A table with its title. said: what stands above it."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    said: str = ""


@dataclass(frozen=True)
class Row:
    """One system at some bits. cells: by seed, of `seeds`. ratio: bytes of the linears against bfloat16. speed: of
    a block, as `benchmarks.latency` has it, if it was measured."""

    system: str
    bits: str
    cells: tuple[dict[str, Any], ...]
    ratio: float
    speed: dict[str, Any] | None = None
    seeds: tuple[int, ...] = ()

    @property
    def psnr(self) -> float:
        """Mean over seeds and prompts, dB."""
        return sum(sum(c["psnr"]) / len(c["psnr"]) for c in self.cells) / len(self.cells)

    def figures(self) -> list[str]:
        """In the order of COLUMNS."""
        return [
            self.system, str(len(self.cells)), f"{self.ratio:.3f}×",
            over_cells(self.cells, lambda c: sum(c["psnr"]) / len(c["psnr"]), 2),
            over_cells(self.cells, lambda c: sum(c["ssim"]) / len(c["ssim"]), 4),
            over_cells(self.cells, lambda c: median(c["latent_error"]), 4), over_cells(self.cells, block_error, 4),
            over_cells(self.cells, lambda c: c.get("frechet"), 4), self._right(),
            over_cells(self.cells, lambda c: c.get("calibration_cpu_seconds"), 0), speed_text(self.speed),
        ]  # fmt: skip

    def _right(self) -> str:
        share, full = (
            sum(c[key]["all"] for c in self.cells) / len(self.cells)
            for key in ("accuracy", "reference_accuracy")
        )
        return f"{100 * share:.1f} ({100 * full:.1f})"


def speed_text(row: dict[str, Any] | None) -> str:
    """Of a block against bfloat16, as in 1.50× (1.40–1.62); a dash where it was not measured."""
    found = (row or {}).get("faster")
    return f"{found['value']:.2f}× ({found['low']:.2f}–{found['high']:.2f})" if found else "–"


def speeds_elsewhere(run: dict[str, Any]) -> Section:
    """Of `benchmarks.latency` on another processor: every system at the widths that were measured."""
    where, rows = run["environment"], run["rows"]
    widths = list(dict.fromkeys(name.split("|")[1] for name in rows if "|" in name))
    systems = dict.fromkeys(name.split("|")[0] for name in rows if "|" in name)
    figures = [[s, *(speed_text(rows.get(f"{s}|{width}")) for width in widths)] for s in systems]
    kernels = where["backend"].split(" with ")[0].removeprefix("cpu: ")
    said = f"""The same block on one core of another processor, {kernels}: times faster than bfloat16 in the same
run, which took {1000 * rows["bf16"]["seconds"]:.0f} ms. Tables of numbers have no kernels on CPUs.
"""
    return Section(f"Block speed: {where['processor']}", ("system", *widths), figures, said)


def rows_of(cells: dict[str, Any], speeds: dict[str, Any] | None = None) -> list[Row]:
    """What has been measured, the best PSNR first among those of equal bits. speeds: rows of `benchmarks.latency`."""
    components = {"transformer": load_pipeline(find_source("digits-video")).transformer}
    found = []
    for bits in LEADERBOARD.bits:
        some = []
        for method in LEADERBOARD.at(bits):
            known = {
                seed: find_cell(cells, LEADERBOARD, method, bits, seed) for seed in sorted(seeds_of(cells))
            }
            kept = {seed: cell for seed, cell in known.items() if cell is not None}
            if kept:
                ratio = planned_ratio(components, method.resolve(bits))
                width = f"W{bits[0]}A{bits[1]}"
                speed = (speeds or {}).get(f"{method.name}|{width}")
                some.append(Row(method.name, width, tuple(kept.values()), ratio, speed, tuple(kept)))
        found += sorted(some, key=lambda row: -row.psnr)
    return found


@dataclass(frozen=True)
class Peer:
    """Another library's row: one seed, the same prompts and noise. ratio: None where it only simulates. speed: as of a
    row."""

    name: str
    ratio: float | None
    row: dict[str, Any]
    speed: dict[str, Any] | None = None

    def figures(self) -> list[str]:
        """In the order of COLUMNS."""
        right, full = self.row["accuracy"]["all"], self.row["reference_accuracy"]["all"]
        return [
            f"{self.name} ({self.row['version']})", "1", "simulated" if self.ratio is None else f"{self.ratio:.3f}×",
            f"{self.row['psnr']:.2f}", f"{self.row['ssim']:.4f}", "–", "–", "–",
            f"{100 * right:.1f} ({100 * full:.1f})", f"{self.row['seconds_to_quantize']:.0f}", speed_text(self.speed),
        ]  # fmt: skip


def speeds_of_peers(path: Path = PEERS, ours: Path = latency.RESULTS) -> dict[str, Any]:
    """Of the run of the peers on the machine, shape, tokens and threads that our own rows were measured with; empty
    where there is none."""
    where = load(ours, "environment")["environment"]
    if not where:
        return {}
    title = f"{where['model']}, {where['tokens']} tokens, {where['processor']}"
    study = load(path, "speed").get("speed", {}).get(title, {})
    return study["rows"] if study.get("threads") == where["threads"] else {}


def said_of_peers(path: Path = PEERS, ours: Path = latency.RESULTS) -> str:
    """What their speeds are beside those of the other tables."""
    theirs = speeds_of_peers(path, ours).get("bf16")
    if theirs is None:
        return ""
    own = load(ours, "rows")["rows"]["bf16"]
    return f"""Block speeds are of another run than above, of the same block on the same kind of machine: bfloat16 took
{1000 * theirs["seconds"]:.0f} ms there and {1000 * own["seconds"]:.0f} ms above, so only ratios compare. What only
simulates has none. Their pages: peers.md. Latent, block and Fréchet errors were not measured of libraries.
"""


def peers(path: Path = PEERS) -> list[Peer]:
    """The libraries that could be measured, the best PSNR first; not full precision, nor attar itself."""
    rows, speeds = load(path, "quality")["quality"], speeds_of_peers(path)
    whole = rows.get("bf16", {}).get("bytes")
    found = [
        Peer(name, row["bytes"] / whole if whole and row.get("bytes") else None, row, speeds.get(name))
        for name, row in rows.items()
        if "psnr" in row and not name.startswith(("fp32", "bf16", "attar"))
    ]
    return sorted(found, key=lambda peer: -peer.row["psnr"])


def plot(rows: list[Row], others: list[Peer]) -> str:
    """Quality against size as an SVG."""
    points = [Point(row.ratio, row.psnr, f"{row.system} {row.bits}", row.system) for row in rows]
    points += [
        Point(p.ratio, p.row["psnr"], p.name, "other libraries") for p in others if p.ratio is not None
    ]
    return scatter(points, "Quality against size", "linears against bfloat16", "PSNR, dB")


def sections(
    rows: list[Row], others: list[Peer], parts: list[list[str]], accuracy: str = ""
) -> list[Section]:
    """All tables. parts: rows of `benchmarks.ablations`. accuracy: a sentence for the first of them."""
    said = f"{leading.SAID}{accuracy}\n{leading.elsewhere(rows)}\n"
    ahead = leading.rows(rows)
    found = [Section(leading.TITLE, leading.COLUMNS, ahead, said)] if ahead else []
    found += [
        Section(bits, COLUMNS, [row.figures() for row in rows if row.bits == bits])
        for bits in dict.fromkeys(row.bits for row in rows)
    ]
    if others:
        found.append(
            Section(
                "Other libraries, at their own formats",
                COLUMNS,
                [peer.figures() for peer in others],
                said_of_peers(),
            )
        )
    found += [speeds_elsewhere(run) for run in latency.elsewhere()]
    if parts:
        found.append(Section("What the parts of the systems give", ablations.COLUMNS, parts, ablations.INTRO))
    return found


def markdown(tables: list[Section]) -> str:
    """The page for reading."""
    lines = [
        "# Leaderboard: digits-video",
        "",
        INTRO,
        OTHERS,
        "![Quality against size](images/leaderboard.svg)",
        "",
    ]
    for table in tables:
        lines += [f"## {table.title}", "", *([table.said] if table.said else [])]
        lines += [*table_lines(table.columns, table.rows), ""]
    return "\n".join(lines)


@dataclass(frozen=True)
class Chapter:
    """A model's part of the HTML page. said: its introduction, paragraphs and lists as in Markdown. picture: an SVG."""

    title: str
    said: str
    picture: str
    tables: list[Section]

    def html(self) -> str:
        """The part."""
        said, _, meanings = self.said.replace("`", "").partition("\n\n- ")
        items = (item.replace("\n", " ") for item in meanings.strip().split("\n- ") if item)
        legend = "".join(f"<li>{_bold(escape(item))}</li>" for item in items)
        parts = [f"<h1>{escape(self.title)}</h1><p>{_bold(escape(said))}</p><ul>{legend}</ul>{self.picture}"]
        for table in self.tables:
            head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
            said = f"<p>{escape(table.said.replace('`', ''))}</p>" if table.said else ""
            parts.append(f"<h2>{escape(table.title)}</h2>{said}<table><tr>{head}</tr>")
            parts += [
                "<tr>" + "".join(f"<td>{escape(f)}</td>" for f in figures) + "</tr>" for figures in table.rows
            ]
            parts.append("</table>")
        return "".join(parts)


def pictured(rows: list[pictures.Row], parts: list[list[str]]) -> list[Chapter]:
    """The models of pictures. parts: rows of `benchmarks.picture_parts`."""
    found = [
        Chapter(
            f"Leaderboard: {model}", pictures.INTRO, pictures.plot(rows, model),
            [
                Section(leading.TITLE, leading.COLUMNS, *pictures.ahead(rows, model)),
                *(Section(bits, pictures.COLUMNS, [r.figures() for r in rows if (r.model, r.bits) == (model, bits)])
                for bits in dict.fromkeys(row.bits for row in rows if row.model == model))
            ],
        )
        for model in dict.fromkeys(row.model for row in rows)
    ]  # fmt: skip
    if parts:
        own = Section(picture_parts.TITLE, picture_parts.COLUMNS, parts, picture_parts.INTRO)
        found[-1].tables.append(own)
    return found


def page(chapters: list[Chapter]) -> str:
    """All models on one self-contained HTML page."""
    style = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>attar leaderboard</title>"
        "<style>body{font:15px system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .7em;text-align:right;"
        "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
        "svg{max-width:100%;height:auto}</style>"
    )
    return style + "".join(chapter.html() for chapter in chapters) + "</html>\n"


def _bold(text: str) -> str:
    return re.sub(r"[*][*](.+?)[*][*]", r"<b>\1</b>", text)


def write_pages(
    rows: list[Row],
    others: list[Peer],
    parts: list[list[str]],
    still: list[pictures.Row],
    still_parts: list[list[str]],
    folder: Path = DOCS,
    accuracy: str = "",
) -> str:
    """docs/leaderboard.md, .html and the picture; returns the first. parts: rows of `benchmarks.ablations`. still: of
    the models of pictures, which stand on the HTML page too, with `still_parts`, rows of `benchmarks.picture_parts`.
    accuracy: a sentence.

    Raises ValueError when there is no row.
    """
    picture, tables = plot(rows, others), sections(rows, others, parts, accuracy)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "leaderboard.svg").write_text(picture, encoding="utf-8")
    (folder / "leaderboard.html").write_text(
        page([Chapter("Leaderboard: digits-video", INTRO, picture, tables), *pictured(still, still_parts)]),
        encoding="utf-8",
    )
    text = markdown(tables)
    (folder / "leaderboard.md").write_text(text, encoding="utf-8")
    return text


def accuracy_of(cells: dict[str, Any]) -> str:
    """What the default recipe keeps of the prompts, on many of them, beside its bar; empty where it is not measured."""
    share, full, prompts = bars.prompts_right(cells, bars.DEFAULT)
    if not prompts:
        return ""
    held = "keeps" if share >= full - 0.01 else "misses"
    right, bar = 100 * share, 100 * full - 1
    return f"""On {prompts} prompts at W4A6 attar has {right:.1f} % all right for {100 * full:.1f} % of full precision,
and {held} the bar of one point less, {bar:.1f} % (the bars of quality.md), whatever its PSNR.
"""


def write_all(videos: Path = quality.RESULTS, stills: Path = pictures.RESULTS, folder: Path = DOCS) -> str:
    """The pages of all models from their results files; returns that of videos."""
    speeds = load(latency.RESULTS, "rows")["rows"]
    cells, still = (load(path, "cells")["cells"] for path in (videos, stills))
    rows, parts = pictures.rows_of(still), picture_parts.rows(still, pictures.BITS)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    pictures.write_page(rows, parts, folder)
    return write_pages(
        rows_of(cells, speeds), peers(), ablations.rows(cells), rows, parts, folder, accuracy_of(cells)
    )


def fill(args: argparse.Namespace) -> None:
    """The cells that are missing, of every model that is asked for, by its own benchmark."""
    if VIDEOS in args.models:
        args.studies = [LEADERBOARD.name]
        quality.run(args)
    stills = [model for model in args.models if model in pictures.MODELS]
    named = [n for n in pictures.NAMES if not args.only or any(part in n for part in args.only)]
    if stills and named:
        asked = {"models": stills, "bits": args.bits or list(pictures.BITS), "only": named}
        where = {"work": args.work_pictures, "results": args.results_pictures}
        pictures.run(argparse.Namespace(**{**vars(args), **asked, **where}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = [VIDEOS, *pictures.MODELS]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--bits", nargs="+", help="only these, e.g. W4A6 W4A4")
    parser.add_argument("--only", nargs="+", help="only systems whose name contains one of these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--work", type=Path, default=Path("work/quality"))
    parser.add_argument("--results", type=Path, default=quality.RESULTS)
    parser.add_argument("--work-pictures", type=Path, default=Path("work/pictures"))
    parser.add_argument("--results-pictures", type=Path, default=pictures.RESULTS)
    parser.add_argument(
        "--again", action="store_true", help="also cells that are older than some of their figures"
    )
    parser.add_argument("--table", action="store_true", help="only write the pages")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        fill(args)
    print(write_all(args.results, args.results_pictures))


if __name__ == "__main__":
    main()
