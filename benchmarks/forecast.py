"""Whether `attar plan --gpu cpu` comes true, a forecast beside a measured block: `python -m benchmarks.forecast`.

    python -m benchmarks.forecast --tokens 512 2048 --rounds 5

One block of a real shape runs dense and packed; before each round the machine's rates are measured anew, so that other
load on the machine touches both. Exit code 1 when a forecast is further off than a quarter.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from torch import nn

from attar.bench.subject import BenchBlock, bench_blocks, latent_grid, pack_block
from attar.forecast.architecture import find_architecture
from attar.forecast.calls import transformer_call
from attar.forecast.counts import Counts, Operation, count_transformer
from attar.forecast.hardware import Hardware
from attar.forecast.latency import predict_latency, quantized_counts
from attar.forecast.measure import measure_cpu
from attar.recipe import Recipe, load_recipe
from attar.runtime.clock import now
from attar.settings import plan_for, transform_settings
from benchmarks.store import FOLDER, load, processor, save

RESULTS = FOLDER / "forecast.json"
TOLERANCE = 0.25
TEXT_TOKENS = 512
RECIPES = {"bf16": None, "rtn W8A8": ("rtn", 8, 8), "attar-ptq W4A6": ("attar-ptq", 4, 6)}


@dataclass(frozen=True)
class Subject:
    """A block that runs, and what it is forecast from."""

    block: BenchBlock
    module: nn.Module
    counts: Counts
    recipe: Recipe | None

    def forecast(self, hardware: Hardware) -> float:
        """Seconds."""
        counts = self.counts
        if self.recipe is not None:
            plans = plan_for(self.recipe, self.block.linears, [])
            counts = quantized_counts(counts, plans, transform_settings(self.recipe), hardware)
            hardware = hardware.running_packed()
        return predict_latency(counts, hardware)["total"]

    @torch.no_grad()
    def measure(self) -> float:
        """Seconds."""
        started = now("cpu")
        self.block.run(self.module)
        return now("cpu") - started


def subjects(shape: str, tokens: int) -> dict[str, Subject]:
    """The first block of a real shape in every form."""
    architecture = find_architecture(shape)
    grid = latent_grid(architecture, tokens)
    name, transformer = next(iter(architecture.transformers.items()))
    whole = count_transformer(transformer, transformer_call(architecture, name, grid, TEXT_TOKENS))
    first = next(iter(whole.blocks))
    inside = whole.where(lambda o: o.block == first)
    block = bench_blocks(architecture, grid, TEXT_TOKENS)[0]
    # the counts name linears by their place in the model, the block by their place in itself
    counts = Counts(tuple(_renamed(o, f"{first}.") for o in inside.operations))
    found = {}
    for title, given in RECIPES.items():
        recipe = None
        if given is not None:
            bits = {"quantize.weights": given[1], "quantize.acts": given[2]}
            recipe = load_recipe(given[0], bits)
        module = block.dense if recipe is None else pack_block(block, recipe)
        found[title] = Subject(block, module, counts, recipe)
    return found


def _renamed(operation: Operation, prefix: str) -> Operation:
    return replace(operation, name=operation.name.removeprefix(prefix))


def measure(shape: str, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds of seconds, forecast seconds, and their ratio in a round, by form of the block."""
    found = subjects(shape, tokens)
    for subject in found.values():
        subject.measure()
    seen: dict[str, list[tuple[float, float]]] = {title: [] for title in found}
    for _ in range(rounds):
        hardware = measure_cpu(rounds=2)
        for title, subject in found.items():
            seen[title].append((subject.measure(), subject.forecast(hardware)))
    return {
        title: {
            "seconds": median(s for s, _ in pairs),
            "forecast": median(f for _, f in pairs),
            "ratio": median(f / s for s, f in pairs),
        }
        for title, pairs in seen.items()
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| block | as | measured, ms | forecast, ms | forecast / measured |",
        "|---|---|---|---|---|",
    ]
    for where, rows in results["blocks"].items():
        for title, row in rows.items():
            times = " | ".join(f"{1000 * row[k]:.0f}" for k in ("seconds", "forecast"))
            lines.append(f"| {where} | {title} | {times} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="wan-1.3b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = load(RESULTS, "blocks")
    made = {
        f"{args.shape}, {n} tokens, {processor()}": measure(args.shape, n, args.rounds) for n in args.tokens
    }
    results["blocks"].update(made)  # machines stand side by side
    environment = {"threads": args.threads, "rounds": args.rounds, "torch": version("torch")}
    results.setdefault("environments", {})[processor()] = environment
    save(RESULTS, results)
    print(table(results))
    ratios = [row["ratio"] for rows in made.values() for row in rows.values()]
    raise SystemExit(0 if all(abs(ratio - 1) <= TOLERANCE for ratio in ratios) else 1)


if __name__ == "__main__":
    main()
