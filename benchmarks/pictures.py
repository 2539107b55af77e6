"""The built-in models of pictures under one protocol: `python -m benchmarks.pictures`.

    python -m benchmarks.pictures                                          every model, system and width, three seeds
    python -m benchmarks.pictures --models digits-image --bits W4A4 --only quest efficientdm --seeds 0
    python -m benchmarks.pictures --table                                  only write docs/pictures.md

One cell (model, system, bits, seed) at a time, kept as soon as it is there. Systems are published recipes, at the given
bits; all of them calibrate on the same traced trajectories and are judged on the same pictures, from the same noise as
full precision.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from attar.calibration.store import TraceStore
from attar.calibration.trace import trace_pipeline, transformer_components
from attar.errors import AttarError
from attar.evaluate.fidelity import latent_error, psnr, ssim
from attar.evaluate.frechet import frechet_distance
from attar.evaluate.generate import generate
from attar.models.source import Source, find_source, load_pipeline
from attar.models.zoo.judges import DigitReader, verdicts
from attar.recipe import Recipe, load_recipe
from attar.runtime.layers import packed_layers
from attar.runtime.patches import dense_biases
from benchmarks import leading, picture_parts, quality
from benchmarks.cells import ACTS_ALIKE, NO_BRANCH, digest
from benchmarks.scatter import Point, scatter
from benchmarks.sizes import planned_ratio
from benchmarks.store import FOLDER, load, save
from benchmarks.tables import mean_text, over_cells, table_lines

DOCS, RESULTS = Path(__file__).parent.parent / "docs", FOLDER / "pictures.json"
MODELS = ("digits-dit", "digits-image")
BITS = ("W4A6", "W4A4", "W3A6", "W8A8", "W4A8", "W2A6")
SYSTEMS = (
    "rtn", "smoothquant", "hadamard", "vidit-q", "s2q-vdit", "svdquant", "lrq-dit", "efficientdm", "quest",
    "quantized-distillation", "qvgen", "mpq-dm", "mpq-dmv2", "attar-ptq", "attar-mixed", "attar",
)  # fmt: skip
AS_LARGE, WITHOUT, ALIKE, NEAREST = (
    "attar, as large as svdquant",
    "attar, without branches",
    "attar, activations alike",
    "attar, modulation to nearest",
)
TO_NEAREST = {"quantize.calibrate_modulation": False, **NO_BRANCH}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # a recipe and its overrides
    AS_LARGE: ("attar", {}),
    WITHOUT: ("attar", NO_BRANCH),
    ALIKE: ("attar", ACTS_ALIKE),
    NEAREST: ("attar", TO_NEAREST),
    **{
        f"{NEAREST}, {what}": ("attar", {**TO_NEAREST, **overrides})
        for what, overrides in {
            "160 samples": {"select.count": 160},
            "activations alike": ACTS_ALIKE,
            "activations and blocks alike": {**ACTS_ALIKE, "allocate.objective": "block"},
            "activations alike, without shifts": {**ACTS_ALIKE, "quantize.shift": False},
            "activations alike, all codes of weights": {**ACTS_ALIKE, "quantize.weight_format": "full_range"},
        }.items()
    },
}
NAMES = (*SYSTEMS, *VARIANTS, *picture_parts.VARIANTS)
TRAINED = ("efficientdm", "quest", "quantized-distillation", "qvgen", "mpq-dm", "mpq-dmv2")  # whole models
# systems that name layers of one kind of model, and such without a part
ONLY_ON = {"quest": "digits-image", **dict.fromkeys(picture_parts.VARIANTS, picture_parts.MODEL)}
# prompts that are traced, those of systems that train whole models, and pictures that are judged
CALIBRATION, TRAINING, SHOWN = 8, 64, 35
COLUMNS = (
    "system",
    "seeds",
    "linears",
    "PSNR dB",
    "SSIM",
    "latent error",
    "Fréchet distance",
    "all right",
    "calibration CPU s",
)
INTRO = f"""What every system makes of the built-in models of pictures, against full precision with the same noise, on
{SHOWN} prompts, {CALIBRATION} traced ones for calibration, {TRAINING} where the whole model is trained. Printed by
`python -m benchmarks.pictures --table`.
**linears**: bytes of the quantized linears and convolutions against bfloat16, with scales, transforms and biases.
Some systems do not exist at some bits: `mpq-dm` and `mpq-dmv2` at eight (rows would have nine),
`lrq-dit` below three; `q-vdit` compares the frames of videos.
**all right**: pictures whose digit and colour are those asked for (in brackets: full precision). ± is the half width of
the 95 % t-interval over seeds; rows of one seed are no more than a hint. A figure that fewer seeds have than
the row says how many: calibration that only took up what another cell had learned has no seconds.
`lrq-dit` is larger than bfloat16 at eight bits: its codes have eight bits, but every row brings a table of its own of
2^8 numbers of two bytes, as much as a row of 256 weights in bfloat16.
`attar-mixed` is `attar-ptq` at two bits, the least there are, and at eight, the most: there is nothing to mix.
The line in each plot is the Pareto frontier: no system lies left of it and above it, at any width.
**latent error**: relative squared error of the final latents, median over prompts; cells that are older than this
column have none. Block errors are not measured here, nor is speed: layers of these models are too small for it; the
speeds of a real model's block stand on the leaderboard of videos.
"""


class PictureBench:
    """What all cells of one model and seed share: traces and the pictures of full precision.

    traced: how many prompts the systems calibrate on.
    """

    def __init__(
        self, source: Source, folder: Path, seed: int, steps: int | None, traced: int = CALIBRATION
    ) -> None:
        self.source, self.seed = source, seed
        self.folder = folder / source.name / f"seed-{seed}"
        if traced != CALIBRATION:
            self.folder = self.folder / f"prompts-{traced}"
        self.call = source.call_arguments(num_inference_steps=steps)
        assert source.folder is not None
        self.reader = DigitReader.load(source.folder)
        self.store = TraceStore(self.folder / "trace")
        pool = source.prompts or source.classes
        self.prompts = [pool[(traced * seed + i) % len(pool)] for i in range(traced)]
        asked = (source.folder / "evaluation_prompts.txt").read_text(encoding="utf-8").split("\n")
        self.shown = [line for line in asked if line.strip()][:SHOWN]
        options = {k: v for k, v in self.call.items() if k not in ("num_inference_steps", "guidance_scale")}
        trace_pipeline(
            self.load(), self.prompts, self.store, steps=int(self.call["num_inference_steps"]),
            guidance_scale=self.call.get("guidance_scale"), seed=1000 * seed, generation=options,
        )  # fmt: skip
        self._full: tuple[Tensor, Tensor] | None = None

    def load(self) -> Any:
        """The full-precision pipeline."""
        pipe = load_pipeline(self.source)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def pictures(self, pipe: Any) -> tuple[Tensor, Tensor]:
        """(pictures (N, 1, 3, H, W) in [0, 1], the latents (N, C, h, w) that they are decoded from)."""
        latents, decode = [], pipe.vae.decode

        def recording(given: Tensor, *args: Any, **kwargs: Any) -> Any:
            latents.append(given.float())
            return decode(given, *args, **kwargs)

        pipe.vae.decode = recording
        try:
            made = generate(pipe, self.shown, seed=100_003 * (self.seed + 1), call=self.call).videos
        finally:
            del pipe.vae.decode
        return made, torch.cat(latents)

    def measure(self, pipe: Any) -> dict[str, Any]:
        """All figures of a compressed pipeline."""
        if self._full is None:
            self._full = self.pictures(self.load())
        (full, latents), (made, final) = self._full, self.pictures(pipe)
        return {
            "psnr": psnr(full, made).tolist(),
            "ssim": ssim(full, made).tolist(),
            "latent_error": latent_error(latents, final).tolist(),
            "frechet": frechet_distance(*map(self.reader.describe, (full, made))),
            "right": self._right(made),
            "reference_right": self._right(full),
            "linears": _linears(pipe, self.load()),
        }

    def _right(self, pictures: Tensor) -> float:
        found = verdicts(pictures, self.shown, self.reader)
        assert found is not None
        return sum(all(verdict.values()) for verdict in found) / len(found)


def _linears(pipe: Any, full: Any) -> float:
    """Packed bytes of the quantized layers against those of the full-precision pipeline in bfloat16."""
    packed = dense = 0
    for component, part in transformer_components(pipe).items():
        layers, biases = packed_layers(part), dense_biases(part)
        original = dict(getattr(full, component).named_parameters())
        for name, layer in layers.items():
            bias = biases.get(f"{name}.bias", f"{name}.bias")  # a shift gives one to layers that had none
            packed += sum(t.numel() * t.element_size() for t in layer.buffers())
            packed += sum(2 * parameter.numel() for parameter in layer.parameters())
            dense += 2 * layer.in_features * layer.out_features + 2 * (bias in original) * layer.out_features
    return packed / dense


def run(args: argparse.Namespace) -> None:
    for model in args.models:
        source = find_source(model)
        components = transformer_components(load_pipeline(source))
        for seed in args.seeds:
            benches: dict[int, PictureBench] = {}
            for bits in args.bits:
                for system in NAMES:
                    if (args.only and system not in args.only) or ONLY_ON.get(system, model) != model:
                        continue
                    weights, acts = (int(n) for n in bits.upper()[1:].split("A"))
                    name = f"{model}|{system}|{bits}|{seed}"
                    try:
                        recipe = recipe_of(system, weights, acts, components)
                    except AttarError as error:
                        print(f"{name:<48} does not exist: {error}", flush=True)
                        continue
                    does = digest(recipe)
                    known = load(args.results, "cells")["cells"].get(name, {})
                    if known.get("recipe") == does and ("latent_error" in known or not args.again):
                        continue
                    traced = TRAINING if recipe.name in TRAINED else CALIBRATION
                    if traced not in benches:
                        benches[traced] = PictureBench(source, args.work, seed, args.steps, traced)
                    bench = benches[traced]
                    pipe, report = quality.compress(bench, recipe)
                    cell = {"recipe": does, **report, **bench.measure(pipe)}
                    results = load(args.results, "cells")
                    results.setdefault("environment", quality.environment(bench.call["num_inference_steps"]))
                    results["cells"][name] = cell
                    save(args.results, results)
                    mean = sum(cell["psnr"]) / len(cell["psnr"])
                    print(f"{name:<48} PSNR {mean:.2f}  right {cell['right']:.3f}", flush=True)


def recipe_of(system: str, weights: int, acts: int, components: Mapping[str, nn.Module]) -> Recipe:
    """At these bits. components: the denoiser."""
    name, overrides = {**VARIANTS, **picture_parts.VARIANTS}.get(system, (system, {}))
    bits = {"quantize.weights": weights, "quantize.acts": acts}
    if system == AS_LARGE:
        overrides = {"allocate.budget": f"{planned_ratio(components, load_recipe('svdquant', bits)):.3f}x"}
    return load_recipe(name, {**overrides, **bits})


@dataclass(frozen=True)
class Row:
    """One system at some bits on one model. cells: by seed, of `seeds`."""

    model: str
    bits: str
    system: str
    cells: tuple[dict[str, Any], ...]
    seeds: tuple[int, ...]

    @property
    def psnr(self) -> float:
        """Mean over seeds and prompts, dB."""
        return _mean([_mean(cell["psnr"]) for cell in self.cells])

    @property
    def ratio(self) -> float:
        """Bytes of the quantized layers against bfloat16."""
        return _mean([cell["linears"] for cell in self.cells])

    def figures(self) -> list[str]:
        """In the order of COLUMNS."""
        right, full = (_mean([c[key] for c in self.cells]) for key in ("right", "reference_right"))
        return [
            self.system, str(len(self.cells)), f"{self.ratio:.3f}×",
            mean_text([_mean(c["psnr"]) for c in self.cells], 2), mean_text([_mean(c["ssim"]) for c in self.cells], 4),
            over_cells(self.cells, lambda c: median(c["latent_error"]) if "latent_error" in c else None, 4),
            mean_text([c["frechet"] for c in self.cells], 4), f"{100 * right:.1f} ({100 * full:.1f})",
            over_cells(self.cells, lambda c: c.get("calibration_cpu_seconds"), 0),
        ]  # fmt: skip


def rows_of(cells: dict[str, Any]) -> list[Row]:
    """What has been measured, by model and bits, the best PSNR first."""
    found = []
    for model, bits in itertools.product(MODELS, BITS):
        some = []
        for system in (*SYSTEMS, *VARIANTS):
            start = f"{model}|{system}|{bits}|"
            kept = {int(name.removeprefix(start)): c for name, c in cells.items() if name.startswith(start)}
            if kept:
                seeds = tuple(sorted(kept))
                some.append(Row(model, bits, system, tuple(kept[seed] for seed in seeds), seeds))
        found += sorted(some, key=lambda row: -row.psnr)
    return found


def plot(rows: list[Row], model: str) -> str:
    """Quality against size on a model, as an SVG."""
    points = [Point(r.ratio, r.psnr, f"{r.system} {r.bits}", r.system) for r in rows if r.model == model]
    return scatter(points, f"{model}: quality against size", "linears against bfloat16", "PSNR, dB")


def ahead(rows: list[Row], model: str) -> tuple[list[list[str]], str]:
    """`benchmarks.leading` of a model: its rows, and what stands above them."""
    here = [row for row in rows if row.model == model]
    return leading.rows(here), leading.SAID + leading.elsewhere(here) + "\n"


def table(rows: list[Row], parts: list[list[str]]) -> str:
    """The page for reading. parts: rows of `benchmarks.picture_parts`."""
    lines = ["# Pictures: digits-dit and digits-image", "", INTRO]
    for model in dict.fromkeys(row.model for row in rows):
        lines += [f"![Quality against size](images/{model}.svg)", ""]
        leads, said = ahead(rows, model)
        if leads:
            lines += [f"## {model}: {leading.TITLE}", "", said, *table_lines(leading.COLUMNS, leads), ""]
        for bits in dict.fromkeys(row.bits for row in rows if row.model == model):
            here = [row.figures() for row in rows if (row.model, row.bits) == (model, bits)]
            lines += [f"## {model}, {bits}", "", *table_lines(COLUMNS, here), ""]
    if parts:
        lines += [f"## {picture_parts.TITLE}", "", picture_parts.INTRO]
        lines += [*table_lines(picture_parts.COLUMNS, parts), ""]
    return "\n".join(lines)


def write_page(rows: list[Row], parts: list[list[str]], folder: Path = DOCS) -> str:
    """pictures.md and its plots; returns the first. parts: rows of `benchmarks.picture_parts`."""
    for model in dict.fromkeys(row.model for row in rows):
        (folder / "images" / f"{model}.svg").write_text(plot(rows, model), encoding="utf-8")
    text = table(rows, parts)
    (folder / "pictures.md").write_text(text, encoding="utf-8")
    return text


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--only", nargs="+", choices=NAMES, help="only these systems")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--work", type=Path, default=Path("work/pictures"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--again", action="store_true", help="also cells that are older than the latent error"
    )
    parser.add_argument("--table", action="store_true", help="only write the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        run(args)
    cells = load(args.results, "cells")["cells"]
    print(write_page(rows_of(cells), picture_parts.rows(cells, BITS)))


if __name__ == "__main__":
    main()
