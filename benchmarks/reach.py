"""Whether errors of weights and of activations add up over the steps of a trajectory: `python -m benchmarks.reach`.

    python -m benchmarks.reach                          the three built-in models, minutes on a CPU
    python -m benchmarks.reach --models digits-dit

One block at a time is quantized (hadamard, W4A8 for the weights' errors, W8A4 for the activations'), and the changes of
the latents in twelve steps of each of two traced trajectories are compared: *alike* is the mean inner product of the
changes of two steps over their mean square, 1 for changes that are the same in every step and 0 for unrelated ones.
*Latents* is what the block's error comes to in the final ones, relative to these, as bits under a budget count it. From
minimum to maximum over the blocks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from attar.budget.influence import Step, accumulated, standing_in
from attar.calibration.store import TraceStore
from attar.calibration.trace import transformer_components
from attar.models.adapter import ModelAdapter
from attar.models.source import find_source
from attar.recipe import load_recipe
from benchmarks.pictures import PictureBench
from benchmarks.protocol import Bench
from benchmarks.quality import compress, environment
from benchmarks.store import FOLDER, load, save

RESULTS = FOLDER / "reach.json"
MODELS = ("digits-video", "digits-dit", "digits-image")
ERRORS = {"weights": (4, 8), "activations": (8, 4)}
STEPS, TRAJECTORIES = 12, 2


def steps_of(store: TraceStore, name: str, transformer: Any, prompt: int) -> list[Step]:
    """Of one trajectory, evenly spread."""
    x, _ = store.latents(prompt)
    places = [int((i + 0.5) / STEPS * store.steps(prompt)) for i in range(STEPS)]
    return [Step(transformer, store.calls(name, prompt, k), x[k].clone(), x[k + 1].clone()) for k in places]


def measure(bench: Any) -> dict[str, Any]:
    """Block -> kind of error -> how alike its changes are, and their sum over the final latents."""
    ((name, full),) = transformer_components(bench.load()).items()
    trajectories = [steps_of(bench.store, name, full, prompt) for prompt in range(TRAJECTORIES)]
    finals = [bench.store.latents(p)[0][-1].double().square().sum().item() for p in range(TRAJECTORIES)]
    found: dict[str, Any] = {}
    for kind, (weights, acts) in ERRORS.items():
        recipe = load_recipe("hadamard", {"quantize.weights": weights, "quantize.acts": acts})
        packed = transformer_components(compress(bench, recipe)[0])[name]
        for block, other in zip(ModelAdapter.of(full).blocks, ModelAdapter.of(packed).blocks, strict=True):
            own = cross = reach = 0.0
            with standing_in(block.module, other.module):
                for steps, final in zip(trajectories, finals, strict=True):
                    changes = torch.stack([step.change(full) for step in steps])
                    products = changes @ changes.T
                    own += products.trace().item()
                    cross += (products.sum() - products.trace()).item()
                    reach += accumulated(list(changes), bench.store.steps(0)) / final / TRAJECTORIES
            alike = cross / ((STEPS - 1) * own) if own else 0.0
            found.setdefault(block.name, {})[kind] = {"alike": alike, "latents": reach}
    return found


def table(models: dict[str, Any]) -> str:
    """A row for each model."""
    head = "| | alike: weights | alike: activations | latents: weights W4 | latents: activations A4 |"
    lines = [head, "|---" * 5 + "|"]
    for model, blocks in models.items():
        cells = []
        for figure, form in (("alike", "{:.2f}"), ("latents", "{:.1e}")):
            for kind in ERRORS:
                values = [block[kind][figure] for block in blocks.values()]
                cells.append(f"{form.format(min(values))} – {form.format(max(values))}")
        lines.append(f"| `{model}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--video-work", type=Path, default=Path("work/quality"))
    parser.add_argument("--work", type=Path, default=Path("work/pictures"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = load(args.results, "models")
    for model in () if args.table else args.models:
        source = find_source(model)
        video = model == "digits-video"
        bench: Any = (
            Bench(source, args.video_work, 0, None, False)
            if video
            else PictureBench(source, args.work, 0, None)
        )
        results["models"][model] = measure(bench)
        results["environment"] = {**environment(0), "model": None, "steps": STEPS}
        save(args.results, results)
    print(table(results["models"]))


if __name__ == "__main__":
    main()
