"""`python -m benchmarks.peers`: every competitor on digits-video (quality) and on a real-size block (speed).

python -m benchmarks.peers --part quality      one after another, each kept as soon as it is there
python -m benchmarks.peers --part speed        all in one run, in turns, on the first block of --shape
python -m benchmarks.peers --part table        writes docs/peers.md from what is there
"""

from __future__ import annotations

import argparse
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from attar import __version__
from attar.models.source import find_source
from attar.runtime.cpu.library import library
from benchmarks.peers.competitors import COMPETITORS, Competitor
from benchmarks.peers.quality import measure_quality
from benchmarks.peers.speed import measure_speed
from benchmarks.peers.table import write_table
from benchmarks.protocol import Bench
from benchmarks.store import FOLDER, failure, load, processor, save

ROOT = Path(__file__).parent.parent.parent
PARTS = ("quality", "speed", "table")
RESULTS = FOLDER / "peers.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", help="only competitors whose name contains one of these")
    parser.add_argument("--again", action="store_true", help="measure what is there already once more")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--shape", default="wan-1.3b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("work/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    if args.only and "speed" in args.part and args.results == RESULTS:
        parser.error("a part of the competitors would replace the speeds of all: give another --results")
    chosen = [c for c in COMPETITORS if not args.only or any(part in c.name for part in args.only)]
    if "quality" in args.part:
        run_quality(args, chosen)
    if "speed" in args.part:
        run_speed(args, chosen)
    if "table" in args.part:
        print(write_table(load(args.results, "quality", "speed"), ROOT / "docs" / "peers.md"))


def run_quality(args: argparse.Namespace, chosen: list[Competitor]) -> None:
    bench: Bench | None = None
    for competitor in chosen:
        if competitor.name in load(args.results, "quality", "speed")["quality"] and not args.again:
            continue
        bench = bench or Bench(find_source("digits-video"), args.work, 0, args.steps)
        figures = attempt(bench, competitor, args.prompts)
        results = load(args.results, "quality", "speed")
        results["quality"][competitor.name] = {"version": _version(competitor), **figures}
        save(args.results, results)
        print(competitor.name, figures, flush=True)


def run_speed(args: argparse.Namespace, chosen: list[Competitor]) -> None:
    results = load(args.results, "quality", "speed")
    rows = measure_speed(chosen, args.shape, args.tokens, args.rounds)
    device = processor()
    results["speed"][f"{args.shape}, {args.tokens} tokens, {device}"] = {  # machines stand side by side
        "device": f"{device}, kernels {library().describe()}",
        "threads": args.threads,
        "rounds": args.rounds,
        "rows": {c.name: {"version": _version(c), **rows[c.name]} for c in chosen},
    }
    save(args.results, results)


def attempt(bench: Bench, competitor: Competitor, prompts: int) -> dict[str, Any]:
    """The figures, or the error that the competitor ended with: a failure is a result too."""
    torch.compiler.reset()
    try:
        return measure_quality(bench, competitor, prompts)
    except Exception as error:
        traceback.print_exc()
        return failure(error)


def _version(competitor: Competitor) -> str:
    if competitor.distribution == "attar":  # may run from its checkout
        return f"attar {__version__}"
    try:
        return f"{competitor.distribution} {version(competitor.distribution)}"
    except PackageNotFoundError:
        return f"{competitor.distribution}, not installed"


if __name__ == "__main__":
    main()
