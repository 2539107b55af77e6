"""Activation bits by layer and by groups of steps, on `digits-video`: `python -m benchmarks.step_groups`.

    python -m benchmarks.step_groups                        vidit-q, W4A6, one seed (minutes on a CPU)
    python -m benchmarks.step_groups --bits W4A4 --seeds 1
    python -m benchmarks.step_groups --table                print the table of what is there already

Weights have the same bits in every layer. Activations have the same everywhere, or as many on average over
multiplications, chosen for each layer, and for each layer and group of steps. Held-out samples and videos are those of
`python -m benchmarks.quality`. One cell at a time, each written when it is done.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from attar.models.source import find_source
from attar.recipe import load_recipe
from benchmarks.cells import block_error
from benchmarks.protocol import Bench
from benchmarks.quality import choose_bits, compress, environment
from benchmarks.store import FOLDER, load, save

RESULTS = FOLDER / "step_groups.json"
WIDTHS = [2, 3, 4, 5, 6, 8]


def overrides(groups: int, bits: tuple[int, int], objective: str, samples: int) -> dict[str, Any]:
    """groups: 0 for the same bits of activations in every layer and step. Weights have no choice in any case."""
    weights, acts = bits
    widths = {
        "quantize.weights": weights,
        "quantize.acts": acts,
        "quantize.roles": {"blocks.*": {"weights": weights}},
    }
    if groups == 0:
        return {**widths, "allocate": None}
    budget = {"budget": "same", "objective": objective, "acts": True, "samples": samples, "bits": WIDTHS}
    return {**widths, "allocate": budget, "quantize.step_groups": groups}


def measure(bench: Bench, recipe_name: str, options: dict[str, Any], prompts: int) -> dict[str, Any]:
    """One cell."""
    recipe, cell = load_recipe(recipe_name, options), {}
    if recipe.allocate is not None:
        found = choose_bits(bench, recipe)
        cell = {"mean_act_bits": found.mean_act_bits, "acts": found.acts["transformer"]}
        recipe = found.apply(recipe)
    pipe, _ = compress(bench, recipe)
    return {**cell, **bench.measure(pipe, prompts)}


def table(cells: dict[str, Any]) -> str:
    """A row for each cell. Latent error: median over prompts."""
    lines = [
        "| recipe | bits | seed | bits of activations | objective | block error | latent error | PSNR dB |",
        "|---" * 8 + "|",
    ]
    for key, cell in sorted(cells.items(), key=lambda item: _order(item[0])):
        recipe, bits, groups, objective, seed = key.split("|")
        what = {"0": "the same everywhere", "1": "by layer"}.get(
            groups, f"by layer and {groups} groups of steps"
        )
        lines.append(
            f"| `{recipe}` | {bits} | {seed} | {what} | {objective} | {block_error(cell):.4f} "
            f"| {statistics.median(cell['latent_error']):.4f} | {sum(cell['psnr']) / len(cell['psnr']):.2f} |"
        )
    return "\n".join(lines)


def _order(key: str) -> tuple[str, str, str, str, str]:
    recipe, bits, groups, objective, seed = key.split("|")
    return recipe, bits, seed, "" if groups == "0" else objective, groups


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="vidit-q")
    parser.add_argument("--bits", nargs="+", default=["W4A6"])
    parser.add_argument("--groups", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--objective", nargs="+", choices=["block", "latents"], default=["latents"])
    parser.add_argument("--samples", type=int, default=12, help="denoising steps that bits are chosen by")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--prompts", type=int, default=24, help="held-out videos of a cell")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("work/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for seed in () if args.table else args.seeds:
        bench = Bench(find_source("digits-video"), args.work, seed, args.steps)
        for bits in args.bits:
            widths = tuple(int(n) for n in bits.upper()[1:].split("A"))
            for groups, objective in ((g, o) for g in args.groups for o in (args.objective if g else ["–"])):
                key = f"{args.recipe}|{bits}|{groups}|{objective}|{seed}"
                if key in load(args.results, "cells")["cells"]:
                    continue
                options = overrides(groups, (widths[0], widths[1]), objective, args.samples)
                cell = measure(bench, args.recipe, options, args.prompts)
                results = load(args.results, "cells")
                results.setdefault("environment", environment(bench.steps))
                results["cells"][key] = cell
                save(args.results, results)
                print(table({key: cell}).splitlines()[-1], flush=True)
    print(table(load(args.results, "cells")["cells"]))


if __name__ == "__main__":
    main()
