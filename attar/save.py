"""Writes a compressed pipeline as an ordinary diffusers folder, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from attar import __version__
from attar.calibration.trace import transformer_components
from attar.conductor import Compression
from attar.errors import AttarError
from attar.evaluate.model_card import ModelCard, model_card
from attar.evaluate.report_data import PlanRow
from attar.evaluate.size import model_size
from attar.models.source import Source, stored_dtype
from attar.quantize.plan import LayerPlan
from attar.recipe import Recipe
from attar.runtime.backend import backend_description
from attar.runtime.layers import packed_layers


def check_destination(folder: Path, overwrite: bool) -> None:
    """Raises AttarError if `folder` cannot be written, or would replace something that is not ours to replace."""
    if folder.exists() and not folder.is_dir():
        raise AttarError("the output is a file", where=str(folder), fix="Name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise AttarError("the output folder is not empty", where=str(folder), fix="Name a new one, or add --overwrite")
    if overwrite and folder.is_dir() and any(folder.iterdir()) and not (folder / "compression.json").is_file():
        raise AttarError(
            "the output folder holds something else than a compressed model", where=str(folder), fix="Name a new one"
        )


def save_compressed(pipe: Any, folder: str | Path, source: Source, plans: dict[str, list[LayerPlan]]) -> Path:
    """Saves the pipeline with its evidence (compression.json), generation defaults and model card.

    Components that were not touched are copied from the source as they are; the floating-point rest of a transformer
    is stored in the type that it had there. The folder appears under its name only when it is complete.
    Raises AttarError when the disk is full.
    """
    folder = Path(folder)
    compression: Compression = pipe.attar_compression
    recipe = Recipe(**compression.recipe)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        components = transformer_components(pipe)
        for name, transformer in components.items():
            if source.folder is not None:
                dtype = stored_dtype(source.folder / name)
                if dtype is not None:
                    transformer.to(dtype)
        pipe.save_pretrained(partial)
        if source.folder is not None:
            _copy_untouched(source.folder, partial, set(components))
        _write(partial / "compression.json", json.dumps(compression.to_json(), indent=1) + "\n")
        card = _card(pipe, folder.name, source, recipe, plans, partial)
        _write(partial / "README.md", model_card(card))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            raise AttarError(
                "the disk is full", where=str(folder), fix="Free some space and run the same command again; it goes on"
            ) from error
        raise AttarError(f"the model cannot be written ({error.strerror or error})", where=str(folder)) from error
    return folder


def plan_rows(plans: dict[str, list[LayerPlan]]) -> list[PlanRow]:
    """Layers that are treated alike, counted."""
    rows: dict[tuple[str, str, str | None], list[int]] = {}
    for name, plan in plans.items():
        for layer in plan:
            bits = "kept" if layer.skipped else f"W{layer.weight_bits}A{layer.act_bits or 16}"
            role = layer.role if len(plans) == 1 else f"{name}: {layer.role}"
            count = rows.setdefault((role, bits, layer.reason), [0, 0])
            count[0] += 1
            count[1] += layer.in_features * layer.out_features
    return [PlanRow(role, bits, n, size, reason) for (role, bits, reason), (n, size) in rows.items()]


def linear_bytes(pipe: Any, plans: dict[str, list[LayerPlan]]) -> tuple[int, int]:
    """(bfloat16, packed) bytes of the linears that were quantized: codes, scales, clips, transforms and biases."""
    dense = packed = 0
    for name, transformer in transformer_components(pipe).items():
        for plan in plans[name]:
            if not plan.skipped:
                dense += 2 * plan.in_features * plan.out_features + (2 * plan.out_features if plan.bias else 0)
        for layer in packed_layers(transformer).values():
            packed += sum(t.numel() * t.element_size() for t in layer.buffers())
            packed += 2 * layer.bias.numel() if layer.bias is not None else 0
    return dense, packed


def _copy_untouched(source: Path, target: Path, compressed: set[str]) -> None:
    """Components as they are in the source, and its own small files about prompts and generation."""
    for item in source.iterdir():
        if item.is_dir() and item.name not in compressed and not item.name.startswith("."):
            shutil.rmtree(target / item.name, ignore_errors=True)
            shutil.copytree(item, target / item.name)
        elif item.name in ("generation.json", "calibration_prompts.txt", "evaluation_prompts.txt", "LICENSE"):
            shutil.copyfile(item, target / item.name)


def _card(
    pipe: Any, name: str, source: Source, recipe: Recipe, plans: dict[str, list[LayerPlan]], folder: Path
) -> ModelCard:
    sizes = {}
    if source.folder is not None:
        before, after = model_size(source.folder), model_size(folder)
        sizes = {part: (before.get(part, size), size) for part, size in after.items()}
    settings: dict[str, Any] = {"recipe": recipe.name, "weights": recipe.quantize.weights, "acts": recipe.quantize.acts}
    if recipe.needs_data and recipe.select is not None:
        settings |= {"calibration samples": recipe.select.count, "selection": recipe.select.policy}
    settings |= {"rotation": recipe.quantize.rotation, "rounding": recipe.rounding.method}
    call = {k: v for k, v in source.generation.items() if k in ("height", "width", "num_frames", "max_sequence_length")}
    return ModelCard(
        name=name, base_model=source.name, recipe=recipe.name, bits=recipe.bits, attar_version=__version__,
        pipeline_tag="text-to-video" if hasattr(pipe, "vae_scale_factor_temporal") else "text-to-image",
        fps=source.fps, dtype="float32" if next(pipe.transformer.parameters()).dtype == torch.float32 else "bfloat16",
        call=call, backend=backend_description(), settings=settings, sizes=sizes, plan=plan_rows(plans),
        example_prompt=source.prompts[0] if source.prompts else "a red fox runs through snow",
    )  # fmt: skip


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


