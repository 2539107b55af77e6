"""Speed of the leaderboard's systems on one block of a real model's shapes: `python -m benchmarks.latency`.

    python -m benchmarks.latency                     every system at W4A6, W4A4 and W3A6, in turns with bfloat16
    python -m benchmarks.latency --bits W4A6 --rounds 5

Learning changes no speed, so blocks are packed with random weights, and a system with bits for each layer with the
same ones in all. The block is `attar bench --shape wan-1.3b --tokens 2048`'s. The leaderboard shows the figures. Each
kind of processor has a results file of its own; `latency.json` is the one that the leaderboard's column is of.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from attar.runtime import backend_description
from benchmarks.cells import LEADERBOARD
from benchmarks.peers.competitors import Competitor, attar, plain
from benchmarks.peers.speed import BASELINE, measure_speed
from benchmarks.quality import environment
from benchmarks.store import FOLDER, file_of, load, processor, save

RESULTS = FOLDER / "latency.json"
SHOWN = ((4, 6), (4, 4), (3, 6))


def results_path(name: str) -> Path:
    """Of a run on a processor of that name."""
    if load(RESULTS, "environment")["environment"].get("processor") in (None, name):
        return RESULTS
    return FOLDER / file_of("latency", name)


def elsewhere() -> list[dict[str, Any]]:
    """The runs on other processors than that of `RESULTS`."""
    return [load(path) for path in sorted(FOLDER.glob("latency-*.json"))]


def competitors(wanted: set[tuple[int, int]]) -> list[Competitor]:
    """bfloat16, and every system at these bits."""
    found = [Competitor(BASELINE, "torch", plain, torch.bfloat16)]
    for weights, acts in (bits for bits in SHOWN if bits in wanted):
        for method in LEADERBOARD.at((weights, acts)):
            if method.overrides:  # a variant of a system
                continue
            make = attar(method.recipe, weights, acts)
            found.append(Competitor(f"{method.name}|W{weights}A{acts}", "attar", make, torch.bfloat16))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    widths = [f"W{w}A{a}" for w, a in SHOWN]
    parser.add_argument("--bits", nargs="+", choices=widths, default=widths)
    parser.add_argument("--shape", default="wan-1.3b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=results_path(processor()))
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = {tuple(int(n) for n in bits.upper()[1:].split("A")) for bits in args.bits}
    measured = measure_speed(competitors(wanted), args.shape, args.tokens, args.rounds)  # type: ignore[arg-type]
    where = {
        **environment(0), "model": args.shape, "steps": None, "tokens": args.tokens, "rounds": args.rounds,
        "threads": 1, "processor": processor(), "backend": backend_description("cpu"),
    }  # fmt: skip
    save(args.results, {"environment": where, "rows": measured})  # of one run alone, so all are comparable
    for name, row in measured.items():
        print(f"{name:<36} {row.get('error') or format(1000 * row['seconds'], '.0f') + ' ms'}  "
              f"{row.get('faster', {}).get('value', 1):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
