"""Mixed against uniform weight bits at equal size, on `digits-video`: `python -m benchmarks.budget`.

    python -m benchmarks.budget                                        every cell (minutes; attar-ptq one seed)
    python -m benchmarks.budget --recipes hadamard --seeds 0 --bits 3
    python -m benchmarks.budget --table                                print the table of what is there already

For every recipe, seed and width b: the held-out block error of b bits in all layers, and of the plan that a budget of b
mean bits gives, from sensitivities on calibration samples. With it the smallest plan whose predicted error is that of b
bits in all layers (0dB). Held-out samples are those of `python -m benchmarks.quality`. One cell at a time, each written
when it is done.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from attar.models.source import find_source
from attar.planning import plan_components
from attar.recipe import Recipe, load_recipe
from attar.save import linear_bytes
from benchmarks.cells import block_error
from benchmarks.protocol import Bench
from benchmarks.quality import choose_bits, compress, environment
from benchmarks.store import FOLDER, load, save
from benchmarks.tables import mean_text

RESULTS = FOLDER / "budget.json"
SEEDS = {"rtn": (0, 1, 2), "hadamard": (0, 1, 2), "attar-ptq": (0,)}
ACTS = 6


def plans(bits: int) -> dict[str, str | None]:
    """Name of a plan -> its budget; None for the same bits in all layers."""
    return {"uniform": None, "mixed": f"{bits}bits", "0dB": "0dB"}


def measure(bench: Bench, recipe: Recipe, prompts: int) -> dict[str, Any]:
    """One cell."""
    cell: dict[str, Any] = {}
    if recipe.allocate is not None:
        found = choose_bits(bench, recipe)
        cell |= {
            "mean_bits": found.mean_bits,
            "predicted": found.predicted_error,
            "together": found.measured_error,
            "predicted_uniform": found.uniform_error,
            "bits": found.bits["transformer"],
        }
        recipe = found.apply(recipe)
    pipe, report = compress(bench, recipe)
    components = {"transformer": bench.load().transformer}
    cell["linear_bytes"] = linear_bytes(pipe, plan_components(components, recipe))[1]
    return {**cell, **report, **bench.measure(pipe, prompts)}


def run(args: argparse.Namespace) -> None:
    source = find_source("digits-video")
    for seed in args.seeds:
        bench = None
        for recipe in args.recipes:
            for bits in args.bits:
                for plan, budget in ((p, b) for p, b in plans(bits).items() if p in args.plans):
                    key = _key(recipe, bits, plan, seed)
                    known = load(args.results, "cells")["cells"].get(key)
                    if seed not in SEEDS[recipe] or (known and (not args.prompts or "psnr" in known)):
                        continue
                    bench = bench or Bench(source, args.work, seed, args.steps)
                    widths = {"quantize.weights": bits, "quantize.acts": ACTS}
                    asked = {} if budget is None else {"allocate.budget": budget}
                    cell = measure(bench, load_recipe(recipe, {**widths, **asked}), args.prompts)
                    results = load(args.results, "cells")
                    results.setdefault("environment", environment(bench.steps))
                    results["cells"][key] = cell
                    save(args.results, results)
                    print(f"{key:<36} block error {block_error(cell):.5f}", flush=True)


def table(cells: dict[str, Any]) -> str:
    """Mixed against uniform, paired over seeds; a pair that is not there yet is a dash."""
    lines = [
        "| recipe | bits | seeds | uniform | mixed, equal size | change | real / predicted | PSNR, uniform → mixed "
        "| bytes at equal predicted error | change of the error |",
        "|---" * 10 + "|",
    ]
    for recipe in SEEDS:
        for bits in sorted({int(key.split("|")[1][1:].split("A")[0]) for key in cells}):
            pairs, same = (_pairs(cells, recipe, bits, plan) for plan in ("mixed", "0dB"))
            if not pairs:
                continue
            assert all(mixed["linear_bytes"] <= uniform["linear_bytes"] for uniform, mixed in pairs)
            videos = [(_psnr(u), _psnr(m)) for u, m in pairs if "psnr" in u and "psnr" in m]
            psnr = " → ".join(mean_text(list(values), 2) for values in zip(*videos, strict=True))
            lines.append(
                f"| `{recipe}` | W{bits}A{ACTS} | {len(pairs)} | {mean_text([block_error(u) for u, _ in pairs], 4)} "
                f"| {mean_text([block_error(m) for _, m in pairs], 4)} "
                f"| {mean_text([_decibels(*p) for p in pairs], 2)} dB "
                f"| {mean_text([m['together'] / m['predicted'] for _, m in pairs], 2)} | {psnr or '–'} "
                f"| {mean_text([100 * (m['linear_bytes'] / u['linear_bytes'] - 1) for u, m in same], 1)} % "
                f"| {mean_text([_decibels(*p) for p in same], 2)} dB |"
            )
    return "\n".join(lines).replace("| – % ", "| – ").replace("| – dB ", "| – ")


def _pairs(
    cells: dict[str, Any], recipe: str, bits: int, plan: str
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(uniform, planned) of every seed that has both."""
    keys = [[_key(recipe, bits, name, seed) for name in ("uniform", plan)] for seed in SEEDS[recipe]]
    return [(cells[first], cells[second]) for first, second in keys if first in cells and second in cells]


def _key(recipe: str, bits: int, plan: str, seed: int) -> str:
    return f"{recipe}|W{bits}A{ACTS}|{plan}|{seed}"


def _decibels(before: dict[str, Any], after: dict[str, Any]) -> float:
    """By how much the held-out block error changed; below 0 is better."""
    return 10 * math.log10(block_error(after) / block_error(before))


def _psnr(cell: dict[str, Any]) -> float:
    return sum(cell["psnr"]) / len(cell["psnr"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", choices=list(SEEDS), default=list(SEEDS))
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 4])
    parser.add_argument("--plans", nargs="+", choices=list(plans(0)), default=list(plans(0)))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=0, help="held-out videos of a cell as well")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("work/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        run(args)
    print(table(load(args.results, "cells")["cells"]))


if __name__ == "__main__":
    main()
