"""`python -m benchmarks.peers`: every competitor on digits-video, each result kept as soon as it is there."""

from __future__ import annotations

import argparse
import json
import platform
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from attar.files import writing
from attar.models.source import find_source
from benchmarks.peers.competitors import COMPETITORS, Competitor
from benchmarks.peers.quality import measure_quality
from benchmarks.protocol import Bench

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="only competitors whose name contains one of these")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure what is there already once more")
    parser.add_argument("--work", type=Path, default=Path("work/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    results = json.loads(args.results.read_text()) if args.results.is_file() else {"quality": {}}
    bench: Bench | None = None
    for competitor in COMPETITORS:
        wanted = not args.only or any(part in competitor.name for part in args.only)
        if not wanted or (competitor.name in results["quality"] and not args.again):
            continue
        bench = bench or Bench(find_source("digits-video"), args.work, 0, args.steps)
        figures = attempt(bench, competitor, args.prompts)
        results["device"] = platform.processor() or platform.machine()
        results["quality"][competitor.name] = {"version": _version(competitor), **figures}
        with writing(args.results) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
        print(competitor.name, figures, flush=True)


def attempt(bench: Bench, competitor: Competitor, prompts: int) -> dict[str, Any]:
    """The figures, or the error that the competitor ended with: a failure is a result too."""
    torch.compiler.reset()
    try:
        return measure_quality(bench, competitor, prompts)
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {text[:300]}"}


def _version(competitor: Competitor) -> str:
    try:
        return f"{competitor.distribution} {version(competitor.distribution)}"
    except PackageNotFoundError:
        return f"{competitor.distribution}, not installed"


if __name__ == "__main__":
    main()
