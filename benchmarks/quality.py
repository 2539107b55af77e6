"""Quality of quantized `digits-video`, paired with full precision: `python -m benchmarks.quality`.

    python -m benchmarks.quality                                   every study, three seeds (hours on a CPU)
    python -m benchmarks.quality --studies main --bits W4A6 --seeds 0
    python -m benchmarks.quality --table                           print the tables of what is there already
    python -m benchmarks.quality --bars                            check the bars; exit code 1 if one does not hold

One cell (study, method, bits, seed) at a time, each written to the results file when it is done, so the command can be
stopped and started again. Tables go to docs/quality.md.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from attar.allocation import RESULT, Allocation, allocate
from attar.calibration.store import TraceStore
from attar.calibration.trace import transformer_components
from attar.finetuning import job_of
from attar.models.source import find_source
from attar.planning import plan_components
from attar.progress import SilentProgress
from attar.recipe import Recipe
from attar.workspace import Workspace
from benchmarks.bars import check_bars
from benchmarks.bars import table as bars_table
from benchmarks.cells import STUDIES, Method, Study, block_error, complete, digest, find_cell, key
from benchmarks.memory import remembering
from benchmarks.protocol import Bench
from benchmarks.store import FOLDER, load, save
from benchmarks.tables import write_tables

ROOT = Path(__file__).parent.parent
RESULTS = FOLDER / "quality.json"


class Calibrated(Protocol):
    """What compressing needs of a bench: the model, and traces of it."""

    folder: Path
    store: TraceStore
    prompts: list[str]
    seed: int

    def load(self) -> Any: ...


def choose_bits(bench: Calibrated, recipe: Recipe) -> Allocation:
    """Of a recipe with a budget. The bench's traces are the calibration data; sensitivities are kept beside them,
    whatever the budget."""
    assert recipe.allocate is not None
    measured = recipe.model_copy(update={"allocate": None})
    widths = "-".join("".join(map(str, some)) for some in (recipe.allocate.bits, recipe.allocate.act_widths))
    workspace = Workspace(bench.folder / "budget" / f"{digest(measured, 'rounding', 'reconstruct')}-{widths}")
    workspace.remove(RESULT)
    components, prompts = transformer_components(bench.load()), len(bench.prompts)
    return allocate(components, recipe, workspace, bench.store, prompts, bench.seed, SilentProgress())


def compress(bench: Calibrated, recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    """A freshly compressed pipeline on the bench's traces, and what its calibration reported."""
    if recipe.allocate is not None:
        recipe = choose_bits(bench, recipe).apply(recipe)
    pipe = bench.load()
    ((name, denoiser),) = transformer_components(pipe).items()
    plan = plan_components({name: denoiser}, recipe)[name]
    propagates = recipe.reconstruct is not None and recipe.reconstruct.propagate == "quant"
    learned = digest(recipe) if propagates else digest(recipe, "rounding", "finetune")
    started = time.process_time()  # the machine may be busy with other cells
    with (
        tempfile.TemporaryDirectory() as folder,
        remembering(bench.folder / "learned" / learned) as memory,
    ):
        job = job_of(recipe)(
            name,
            denoiser,
            plan,
            recipe,
            Workspace(folder),
            bench.store,
            bench.seed,
            SilentProgress(),
        )
        evidence = job.run(len(bench.prompts))
    report: dict[str, Any] = {
        "calibration_errors": [[b["error_before"], b["error_after"]] for b in evidence["blocks"]]
    }
    if "finetune" in evidence:
        report["finetune"] = evidence["finetune"]
    if not memory.used:
        report["calibration_cpu_seconds"] = round(time.process_time() - started, 1)
    if "selection" in evidence:
        table, chosen = evidence["selection"]["table"], evidence["selection"]["chosen"]
        report["chosen"] = [[table["prompt"][i], table["step"][i]] for i in chosen]
    return pipe, report


def environment(steps: int) -> dict[str, Any]:
    return {
        "model": "digits-video",
        "steps": steps,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def run(args: argparse.Namespace) -> None:
    source = find_source("digits-video")
    wanted = None if not args.bits else {tuple(int(n) for n in b.upper()[1:].split("A")) for b in args.bits}
    for seed in args.seeds:
        benches: dict[bool, Bench] = {}
        for study, bits, method in _cells(args.studies, wanted, args.only):
            known = find_cell(load(args.results, "cells")["cells"], study, method, bits, seed)
            if known is not None and (complete(study, known) or not args.again):
                continue
            if study.outliers not in benches:
                benches[study.outliers] = Bench(source, args.work, seed, args.steps, study.outliers)
            bench = benches[study.outliers]
            recipe = method.resolve(bits)
            pipe, report = compress(bench, recipe)
            cell = {"recipe": digest(recipe), **report, **bench.measure(pipe, study.prompts)}
            results = load(args.results, "cells")  # cells may be filled by several processes side by side
            results.setdefault("environment", environment(bench.steps))
            name = key(study.name, method.name, bits, seed)
            results["cells"][name] = cell
            save(args.results, results)
            print(_line(name, cell), flush=True)


def _cells(
    studies: list[str], wanted: set[tuple[int, ...]] | None, only: list[str] | None
) -> Iterator[tuple[Study, tuple[int, int], Method]]:
    for study in (STUDIES[name] for name in studies):
        for bits in study.bits:
            if wanted is None or bits in wanted:
                for method in study.at(bits):
                    if not only or any(part in method.name for part in only):
                        yield study, bits, method


def _line(key: str, cell: dict[str, Any]) -> str:
    text = f"{key:<52} block error {block_error(cell):.5f}"
    if "psnr" in cell:
        text += f"  PSNR {sum(cell['psnr']) / len(cell['psnr']):.2f}  all right {cell['accuracy']['all']:.3f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--bits", nargs="+", help="only these, e.g. W4A6 W4A4")
    parser.add_argument("--only", nargs="+", help="only methods whose name contains one of these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("work/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="also cells older than the Fréchet distance")
    parser.add_argument("--table", action="store_true", help="only write and print the tables")
    parser.add_argument("--bars", action="store_true", help="only check the bars")
    args = parser.parse_args()
    if args.bars:
        verdicts = check_bars(load(args.results, "cells")["cells"])
        print(bars_table(verdicts))
        raise SystemExit(0 if all(v.holds for v in verdicts) else 1)
    torch.set_num_threads(args.threads)
    if not args.table:
        run(args)
    print(write_tables(load(args.results, "cells"), ROOT / "docs" / "quality.md"))


if __name__ == "__main__":
    main()
