"""Quality of quantized `digits-video`, paired with full precision: `python -m benchmarks.quality`.

    python -m benchmarks.quality                                   every study, three seeds (hours on a CPU)
    python -m benchmarks.quality --studies main --bits W4A6 --seeds 0
    python -m benchmarks.quality --table                           print the tables of what is there already

One cell (study, method, bits, seed) at a time, each written to the results file when it is done, so the command can be
stopped and started again. Tables go to docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from attar.component import ComponentJob
from attar.conductor import plan_component
from attar.errors import AttarError
from attar.files import writing
from attar.models.source import find_source, load_pipeline
from attar.progress import SilentProgress
from attar.recipe import load_recipe
from attar.workspace import Workspace
from benchmarks.cells import STUDIES, Method
from benchmarks.protocol import Bench
from benchmarks.tables import write_tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"


def compress(bench: Bench, method: Method, weights: int, acts: int) -> tuple[Any, dict[str, Any]]:
    """A freshly compressed pipeline on the bench's traces, and what its calibration reported."""
    bits = {"quantize.weights": weights, "quantize.acts": acts}
    recipe = load_recipe(method.recipe, {**method.overrides, **bits})
    pipe = load_pipeline(bench.source)
    plan = plan_component(pipe.transformer, recipe)
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        job = ComponentJob(
            "transformer",
            pipe.transformer,
            plan,
            recipe,
            Workspace(folder),
            bench.store,
            bench.seed,
            SilentProgress(),
        )
        evidence = job.run(len(bench.prompts))
    report = {"calibration_seconds": round(time.time() - started, 1)}
    report["calibration_errors"] = [[b["error_before"], b["error_after"]] for b in evidence["blocks"]]
    if "selection" in evidence:
        table, chosen = evidence["selection"]["table"], evidence["selection"]["chosen"]
        report["chosen"] = [[table["prompt"][i], table["step"][i]] for i in chosen]
    return pipe, report


def load_results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {"cells": {}}


def save_results(path: Path, results: dict[str, Any]) -> None:
    with writing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=0) + "\n")


def environment(prompts: int, steps: int) -> dict[str, Any]:
    return {
        "model": "digits-video",
        "prompts": prompts,
        "steps": steps,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def run(args: argparse.Namespace) -> None:
    source = find_source("digits-video")
    results = load_results(args.results)
    wanted = None if not args.bits else {tuple(int(n) for n in b.upper()[1:].split("A")) for b in args.bits}
    for seed in args.seeds:
        bench: Bench | None = None
        for name in args.studies:
            study = STUDIES[name]
            for weights, acts in study.bits:
                if wanted is not None and (weights, acts) not in wanted:
                    continue
                for method in study.methods:
                    key = f"{name}|{method.name}|W{weights}A{acts}|{seed}"
                    if key in results["cells"] or (
                        args.only and not any(o in method.name for o in args.only)
                    ):
                        continue
                    if bench is None:
                        bench = Bench(source, args.work, seed, args.prompts, args.steps)
                        print(f"seed {seed}: full precision {_shares(bench.reference_accuracy)}", flush=True)
                    pipe, report = compress(bench, method, weights, acts)
                    cell = {**report, **bench.measure(pipe, videos=not args.blocks_only)}
                    # cells may be filled by several processes side by side
                    results = load_results(args.results)
                    results.setdefault("environment", environment(args.prompts, bench.steps))
                    if results["environment"]["prompts"] != args.prompts:
                        raise AttarError(
                            "the results file was made with another --prompts", where=str(args.results)
                        )
                    results["cells"][key] = cell
                    save_results(args.results, results)
                    print(_line(key, cell), flush=True)


def _shares(accuracy: dict[str, list[bool]]) -> dict[str, float]:
    return {k: round(sum(v) / len(v), 4) for k, v in accuracy.items()}


def _line(key: str, cell: dict[str, Any]) -> str:
    block = sum(cell["block_errors"]) / len(cell["block_errors"])
    text = f"{key:<52} block error {block:.5f}"
    if "psnr" in cell:
        text += f"  PSNR {sum(cell['psnr']) / len(cell['psnr']):.2f}  all right {cell['accuracy']['all']:.3f}"
    return text + f"  ({cell['calibration_seconds']} s)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--bits", nargs="+", help="only these, e.g. W4A6 W4A4")
    parser.add_argument("--only", nargs="+", help="only methods whose name contains one of these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--prompts", type=int, default=60, help="held-out prompts that are generated for each cell"
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--blocks-only", action="store_true", help="measure block errors, generate nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("work/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write and print the tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        run(args)
    print(write_tables(load_results(args.results), ROOT / "docs" / "quality.md"))


if __name__ == "__main__":
    main()
