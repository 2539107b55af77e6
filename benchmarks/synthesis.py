"""Synthesised calibration data for a decoder with batch normalisation: `python -m benchmarks.synthesis`.

    python -m benchmarks.synthesis            train, quantize, measure (minutes on one core)
    python -m benchmarks.synthesis --recipes  the same for the recipes zeroq and genie as they are
    python -m benchmarks.synthesis --table    print the tables of what is there already

A small AutoencoderDC, whose decoder normalises by batches, learns the pictures of handwriting that the built-in models
were trained with. Its decoder's layers are then quantized, up block by up block, on noise, on latents synthesised as in
ZeroQ and in Genie, and on the latents of real pictures. What is measured is how near the pictures of held-out
handwriting are to those of the full-precision decoder.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

import attar
from attar.calibration.synthesize import statistics_error
from attar.evaluate.fidelity import psnr
from attar.evaluate.statistics import mean_interval
from attar.losses import mse
from attar.models.block import BlockCall, run_block
from attar.models.linears import Linear, open_linears
from attar.models.zoo.pictures import all_pictures
from attar.models.zoo.training.data import Pictures, handwriting
from attar.quantize.block import quantize_block
from attar.quantize.block_settings import BlockSettings
from attar.quantize.initialize import TransformSettings
from attar.quantize.plan import LayerPlan, plan_layers
from attar.quantize.reconstruct import ReconstructionSettings
from attar.recipe import load_recipe
from benchmarks.store import FOLDER, load, save
from benchmarks.tables import estimate_text, table_lines

RESULTS = FOLDER / "synthesis.json"
RECIPES = FOLDER / "synthesis-recipes.json"
CALIBRATION, HELD_OUT, BATCH = 64, 256, 4  # pictures, pictures, and latents in a call of a block
STEPS = {"inputs": 200, "generator": 200}  # of synthesis
SOURCES = {
    "noise": "noise of the latents' mean and deviation",
    "inputs": "ZeroQ's latents",
    "generator": "Genie's latents",
    "real": "latents of real pictures",
}
NOISE = {"synthesize.by": "noise"}
RECIPE_CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {"quantize.weights": 4, "quantize.acts": 8, **NOISE}),  # which needs no data
    "zeroq, on noise, blocks alike": ("zeroq", {**NOISE, "allocate.objective": "block"}),
    "zeroq, on noise": ("zeroq", NOISE),
    "zeroq": ("zeroq", {}),
    "genie, on noise": ("genie", NOISE),
    "genie": ("genie", {}),
}
PLAIN = BlockSettings(TransformSettings(scale=False, rotation="none"), weight_clip=False, act_clip=False)
CALIBRATED = BlockSettings(TransformSettings(rotation="none"), clip_search=True, gptq_damping=0.01)
LEARNING = ReconstructionSettings(epochs=3, batch_size=4, normalise_loss=True)
SETTINGS = {
    "scales and GPTQ": CALIBRATED,
    "and learned codes": replace(CALIBRATED, rounding=LEARNING),
    "and their scales": replace(CALIBRATED, rounding=replace(LEARNING, scale_lr=1e-3)),
}


def train(steps: int, batch: int = 16) -> tuple[AutoencoderDC, Tensor, Tensor]:
    """The autoencoder, latents of pictures it was trained with, and of held-out handwriting."""
    torch.manual_seed(0)
    model = AutoencoderDC(
        latent_channels=8, attention_head_dim=16,
        encoder_block_types="ResBlock", decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(16, 32, 64), decoder_block_out_channels=(16, 32, 64),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
        decoder_norm_types="batch_norm", decoder_act_fns="relu",
    )  # fmt: skip
    scans, labels, held_scans, held_labels = handwriting()
    pictures = Pictures(scans, labels, all_pictures(), torch.device("cpu"))
    held_out = Pictures(held_scans, held_labels, all_pictures(), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        x = pictures.draw(batch)[1] * 2 - 1
        error = model.decode(model.encode(x).latent).sample - x
        optimizer.zero_grad(set_to_none=True)
        (error.abs().mean() + error.square().mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)
    with torch.no_grad():
        known, others = (
            model.encode(p.draw(n)[1] * 2 - 1).latent
            for p, n in ((pictures, 4 * CALIBRATION), (held_out, HELD_OUT))
        )
    return model, known, others


def plans_of(decoder: nn.Module, weights: int, acts: int) -> dict[str, dict[str, LayerPlan]]:
    """Up block -> the plans of its layers, by their names in it. What is in no up block stays as it is."""
    found = {}
    for k, block in reversed(list(enumerate(decoder.up_blocks))):  # type: ignore[arg-type]
        linears = [Linear(name, form, "other", kept) for name, form, kept in open_linears(block, True, {})]
        plans = plan_layers(linears, [], weights, acts)
        found[f"up_blocks.{k}"] = {plan.name: plan for plan in plans if not plan.skipped}
    return found


def quantize(
    decoder: nn.Module, data: Tensor, settings: BlockSettings, bits: tuple[int, int], seed: int
) -> nn.Module:
    """A quantized copy. data: latents; each block is calibrated on what they give in full precision."""
    packed = copy.deepcopy(decoder)
    inputs, targets = _streams(decoder, data)
    for name, plans in plans_of(packed, *bits).items():
        block = packed.get_submodule(name)
        calls = [BlockCall({"input": part}) for part in inputs[name].split(BATCH)]
        wanted = [{"input": part} for part in targets[name].split(BATCH)]
        quantize_block(
            block, plans, lambda call, block=block: run_block(block, call, ("input",)), calls, wanted, settings,
            loss=lambda prediction, target, _: mse(prediction, target), seed=f"{seed}/{name}",
        )  # fmt: skip
    return packed


@torch.no_grad()
def _streams(decoder: nn.Module, data: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each up block gets and what it gives, in full precision."""
    inputs, targets, handles = {}, {}, []
    for k, block in enumerate(decoder.up_blocks):  # type: ignore[arg-type]

        def keep(module: nn.Module, args: Any, result: Tensor, name: str = f"up_blocks.{k}") -> None:
            inputs[name], targets[name] = args[0], result

        handles.append(block.register_forward_hook(keep))
    try:
        decoder(data)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, targets


@torch.no_grad()
def pictures_of(decoder: nn.Module, data: Tensor) -> Tensor:
    """(B, 1, 3, H, W) in [0, 1]."""
    return (decoder(data).clamp(-1, 1)[:, None] + 1) / 2


def latents_for(
    source: str, decoder: nn.Module, known: Tensor, seed: int, steps: Mapping[str, int]
) -> Tensor:
    """Calibration latents (CALIBRATION, C, H, W). Of the real ones' statistics mean and deviation alone are used, as
    an autoencoder's configuration has them (scaling_factor, shift_factor)."""
    mean, deviation = known.mean().item(), known.std().item()
    rng = torch.Generator().manual_seed(seed)
    if source == "real":
        return known[torch.randperm(len(known), generator=rng)[:CALIBRATION]]
    if source == "noise":
        return mean + deviation * torch.randn(CALIBRATION, *known.shape[1:], generator=rng)
    return attar.synthesize(
        decoder, known.shape[1:], CALIBRATION, by=source, steps=steps[source], seed=seed,
        input_statistics=(mean, deviation),
    )  # fmt: skip


def measure(seeds: int, train_steps: int, steps: Mapping[str, int]) -> dict[str, Any]:
    """All cells: source -> the distance of its statistics, and PSNR in dB by settings, of each seed."""
    vae, known, held_out = train(train_steps)
    decoder, bits = vae.decoder, (4, 4)
    reference = pictures_of(decoder, held_out)

    def quality(settings: BlockSettings, data: Tensor, seed: int) -> float:
        found = psnr(reference, pictures_of(quantize(decoder, data, settings, bits, seed), held_out))
        return found.mean().item()

    cells: dict[str, Any] = {"none": {"nearest": [quality(PLAIN, known[:BATCH], 0)]}}
    for source in SOURCES:
        cell: dict[str, list[float]] = {"distance": [], **{name: [] for name in SETTINGS}}
        for seed in range(seeds):
            data = latents_for(source, decoder, known, seed, steps)
            cell["distance"].append(statistics_error(decoder, data))
            for name, settings in SETTINGS.items():
                cell[name].append(quality(settings, data, seed))
            print(source, seed, {name: round(values[-1], 3) for name, values in cell.items()}, flush=True)
        cells[source] = cell
    return cells


def measure_recipes(
    seeds: int, train_steps: int, steps: Mapping[str, int], known: Mapping[str, list[float]]
) -> dict[str, list[float]]:
    """Recipe, with what is changed in it -> PSNR in dB of each seed, at the recipe's own bits (W4A8).

    known: what was measured before, which is not measured again.
    """
    if RECIPE_CELLS.keys() <= known.keys():
        return {name: known[name] for name in RECIPE_CELLS}
    vae, latents, held_out = train(train_steps)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    reference = pictures_of(vae.decoder, held_out)
    cells = {}
    for name, (recipe, changes) in RECIPE_CELLS.items():
        overrides = {"synthesize.side": latents.shape[-1], **changes}
        if "synthesize.by" not in changes:
            overrides["synthesize.steps"] = steps[load_recipe(recipe, overrides).synthesize.by]  # type: ignore[union-attr]
        values = list(known.get(name, ()))
        for seed in range(len(values), seeds):
            small = attar.compress(copy.deepcopy(vae), recipe, overrides=overrides, seed=seed).vae
            values.append(psnr(reference, pictures_of(small.decoder, held_out)).mean().item())
        cells[name] = values
        print(name, values, flush=True)
    return cells


def recipe_table(cells: Mapping[str, Any]) -> str:
    """A row for each recipe and what it is calibrated on."""
    rows = [[name, estimate_text(mean_interval(values), 2)] for name, values in cells.items()]
    return "\n".join(table_lines(["recipe", "PSNR, dB"], rows))


def table(cells: Mapping[str, Any]) -> str:
    """A row for each source of data."""
    rows = [["none, rounded to nearest", "–", f"{cells['none']['nearest'][0]:.2f}", "–", "–"]]
    for source, label in SOURCES.items():
        cell = cells[source]
        figures = [estimate_text(mean_interval(cell[name]), 2) for name in SETTINGS]
        rows.append([label, f"{sum(cell['distance']) / len(cell['distance']):.3g}", *figures])
    return "\n".join(table_lines(["calibrated on", "distance", *SETTINGS], rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--recipes", action="store_true", help="measure the recipes")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.recipes:
        cells = measure_recipes(args.seeds, args.train_steps, STEPS, load(RECIPES, "cells")["cells"])
        save(RECIPES, {"steps": STEPS, "train_steps": args.train_steps, "cells": cells})
    elif not args.table:
        cells = measure(args.seeds, args.train_steps, STEPS)
        save(args.results, {"steps": STEPS, "train_steps": args.train_steps, "cells": cells})
    print(table(load(args.results, "cells")["cells"]))
    print(recipe_table(load(RECIPES, "cells")["cells"]))


if __name__ == "__main__":
    main()
