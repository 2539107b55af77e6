"""Writes a compressed pipeline as an ordinary diffusers folder, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from attar import __version__
from attar.allocation import PLAN, Allocation
from attar.assemble import Packed, write_weights
from attar.conductor import Compression
from attar.errors import AttarError
from attar.evaluate.model_card import ModelCard, model_card
from attar.evaluate.report_data import PlanRow
from attar.evaluate.size import model_size
from attar.files import check_writable, not_written
from attar.models.calls import by_class, makes_videos
from attar.models.shards import Shards
from attar.models.source import Source
from attar.quantize.plan import LayerPlan
from attar.recipe import Recipe, changed_settings
from attar.runtime.integrity import EVIDENCE, file_checksums
from attar.runtime.layers import packed_layers
from attar.settings import block_settings
from attar.stored import OUTSIDE, block_file
from attar.text_encoder import packed_config
from attar.workspace import Workspace

# files beside the components that belong to the model
_COPIED = (
    "model_index.json",
    "generation.json",
    "calibration_prompts.txt",
    "evaluation_prompts.txt",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)


# of a model's generation defaults, what the example in its card passes on
_CALL = ("height", "width", "num_frames", "max_sequence_length", "num_inference_steps", "guidance_scale")

_MANY = 12  # overrides that the card still lists one by one


def check_destination(
    folder: Path, overwrite: bool, workspace: Path | None = None, source: Source | None = None
) -> None:
    """Raises AttarError if `folder` cannot be written, or would replace something that is not ours to replace, or lies
    where the source is read from."""
    for place, what in ((folder, "output"), (workspace, "workspace")):
        if place is not None and source is not None:
            _check_apart(place, what, source)
    if folder.exists() and not folder.is_dir():
        raise AttarError("the output is a file", where=str(folder), fix="Name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            fix = "Name a new one, or add --overwrite"
            raise AttarError("the output folder is not empty", where=str(folder), fix=fix)
        if not (folder / EVIDENCE).is_file():
            what = "the output folder holds something else than a compressed model"
            raise AttarError(what, where=str(folder), fix="Name a new one")
    place = Path(os.path.realpath(folder))
    if workspace is not None:
        work = Path(os.path.realpath(workspace))
        if {place, *_passing(place)} & {work, *work.parents}:
            fix = "Name another --workspace"
            raise AttarError("the workspace lies in the output folder", where=str(workspace), fix=fix)
    if place.is_mount():  # it could not be replaced in one go
        raise AttarError(
            "the output folder is a mount point", where=str(folder), fix="Name a folder inside it"
        )
    check_writable(place.parent)


def _check_apart(place: Path, what: str, source: Source) -> None:
    """What is written lies neither around the source nor in a component of it, which would be copied into itself."""
    if source.folder is None:
        return
    real, home = Path(os.path.realpath(place)), Path(os.path.realpath(source.folder))
    parts = {Path(os.path.realpath(source.folder / name)) for name in _index(source)}
    parts |= {home} if source.alone else set()
    if real in (home, *home.parents) or parts & {real, *real.parents}:
        where = "around" if real in home.parents else "in"
        fix = f"Name {'an' if what == 'output' else 'a'} {what} folder beside it"
        raise AttarError(f"the {what} lies {where} the model that is compressed", where=str(place), fix=fix)


def _index(source: Source) -> list[str]:
    """The components that the folder of a pipeline says it has, and its other arguments."""
    assert source.folder is not None
    if source.alone:
        return []
    index = json.loads((source.folder / "model_index.json").read_text(encoding="utf-8"))
    return [name for name in index if not name.startswith("_")]


def save_compressed(
    pipe: Any, folder: str | Path, source: Source, plans: dict[str, list[LayerPlan]], workspace: Workspace
) -> Path:
    """Saves the pipeline of a source folder with its evidence (compression.json), generation defaults and model card.

    Packed layers come from the workspace. Components that were not touched are copied from the source as they are, and
    so is the floating-point rest of a transformer; nothing of it need be in memory. The folder appears under its name
    only when it is complete, and then replaces a former one. Equal pipelines give equal files.
    Raises AttarError when the disk is full or the place cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    compression: Compression = pipe.attar_compression
    partial, former = _passing(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        copied = _save_components(pipe, partial, source, workspace)
        content = compression.to_json()
        recipe = Recipe(**compression.recipe)
        content["bits"], content["changed_settings"] = recipe.bits, changed_settings(recipe)
        content["copied"] = file_checksums(partial, copied)
        for name, part in content["components"].items():
            part["plan"] = [vars(row) for row in plan_rows({name: plans[name]}, recipe)]
        (partial / EVIDENCE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        card = _card(pipe, folder.name, source, recipe, plans, partial)
        if compression.allocation is not None:
            shutil.copyfile(workspace.folder / PLAN, partial / PLAN)
        (partial / "README.md").write_text(model_card(card), encoding="utf-8")
        shutil.rmtree(former, ignore_errors=True)
        if folder.exists():
            os.replace(folder, former)
        os.replace(partial, folder)
        shutil.rmtree(former, ignore_errors=True)
    except (OSError, shutil.Error, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise not_written(error, folder) from error
    return folder


def _passing(folder: Path) -> tuple[Path, Path]:
    """Where a checkpoint grows, and where the one waits that it replaces."""
    return folder.with_name(f".{folder.name}.attar-partial"), folder.with_name(f".{folder.name}.attar-former")


def _compressed(pipe: Any) -> dict[str, Any]:
    """The components that the compression was of."""
    return {name: pipe.components[name] for name in pipe.attar_compression.components}


def _save_components(pipe: Any, target: Path, source: Source, workspace: Workspace) -> list[str]:
    """Returns the files of the components that were copied as they are."""
    assert source.folder is not None
    transformers, evidence = _compressed(pipe), pipe.attar_compression.components
    target.mkdir(parents=True)
    for name, transformer in transformers.items():
        place = source.place(target, name)
        transformer.save_config(place)
        files = [
            Packed(f"{name}/{block_file(index)}", f"{block['block']}.")
            for index, block in enumerate(evidence[name]["blocks"])
        ]
        if workspace.has(f"{name}/{OUTSIDE}"):
            files.append(Packed(f"{name}/{OUTSIDE}", ""))
        shards = Shards(source.place(source.folder, name))
        write_weights(transformer, files, workspace, shards, place, "diffusion_pytorch_model")
    copied: list[str] = []
    for name in _index(source):
        if name in pipe.attar_compression.text_encoders:
            layers = pipe.attar_compression.text_encoders[name]["layers"]
            _save_text_encoder(name, pipe.components[name], layers, target, source, workspace)
        elif name not in transformers and (source.folder / name).is_dir():
            shutil.copytree(source.folder / name, target / name)
            inside = (path for path in (target / name).rglob("*") if path.is_file())
            copied += [path.relative_to(target).as_posix() for path in inside]
    for name in _COPIED:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, target / name)
    return copied


def _save_text_encoder(
    name: str, encoder: Any, layers: list[str], target: Path, source: Source, workspace: Workspace
) -> None:
    assert source.folder is not None
    weights = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
    shutil.copytree(source.folder / name, target / name, ignore=shutil.ignore_patterns(*weights))
    config = target / name / "config.json"
    content = packed_config(config.read_text(encoding="utf-8"), encoder.config.quantization_config.to_dict())
    config.unlink()
    config.write_text(content, encoding="utf-8")
    files = [Packed(f"{name}/{block_file(i)}", f"{layer}.") for i, layer in enumerate(layers)]
    write_weights(encoder, files, workspace, Shards(source.folder / name), target / name, "model")


def plan_rows(plans: dict[str, list[LayerPlan]], recipe: Recipe) -> list[PlanRow]:
    """Layers that are treated alike, counted."""
    settings = block_settings(recipe)
    rows: dict[tuple[str, str, str | None, str | None], list[int]] = {}
    for name, plan in plans.items():
        for layer in plan:
            treatment = ", ".join(settings.treatment(layer)) or None
            role = layer.role if len(plans) == 1 else f"{name}: {layer.role}"
            count = rows.setdefault((role, layer.bits, layer.reason, treatment), [0, 0])
            count[0] += 1
            count[1] += layer.in_features * layer.out_features
    return [PlanRow(role, bits, n, size, *why) for (role, bits, *why), (n, size) in rows.items()]


def linear_bytes(pipe: Any, plans: dict[str, list[LayerPlan]]) -> tuple[int, int]:
    """(bfloat16, packed) bytes of the linears that were quantized: codes, scales, clips, transforms and biases.

    Biases count two bytes an element in both, whatever type this pipeline holds them in.
    """
    dense = packed = 0
    for name, transformer in _compressed(pipe).items():
        for plan in plans[name]:
            if not plan.skipped:
                dense += 2 * plan.in_features * plan.out_features + (
                    2 * plan.out_features if plan.bias else 0
                )
        for layer in packed_layers(transformer).values():
            packed += sum(t.numel() * t.element_size() for t in layer.buffers())
            packed += sum(2 * parameter.numel() for parameter in layer.parameters())
    return dense, packed


def _card(
    pipe: Any, name: str, source: Source, recipe: Recipe, plans: dict[str, list[LayerPlan]], folder: Path
) -> ModelCard:
    sizes = {}
    if source.folder is not None and any(source.folder.rglob("*.safetensors")):
        before, after = model_size(source.folder), model_size(folder)
        sizes = {part: (before.get(part, size), size) for part, size in after.items()}
        if source.alone:
            sizes = {name: sizes["."] for name in pipe.components}
    settings: dict[str, Any] = {
        "recipe": recipe.name,
        "weights": recipe.quantize.weights,
        "acts": recipe.quantize.acts,
    }
    if recipe.needs_data and recipe.select is not None:
        settings |= {"calibration samples": recipe.select.count, "selection": recipe.select.policy}
    if recipe.synthesize is not None:
        settings |= {"calibration samples": recipe.synthesize.count, "synthesised by": recipe.synthesize.by}
    if recipe.text_encoder is not None:
        settings["text encoder"] = f"{recipe.text_encoder.weights}-bit weights"
    allocation: Allocation | None = pipe.attar_compression.allocation
    if allocation is not None:
        acts = allocation.mean_act_bits
        means = f"{allocation.mean_bits:.3f} bits on average" + (
            "" if acts is None else f", activations {acts:.3f}"
        )
        settings["budget"] = f"{allocation.budget}: {means} ({PLAN})"
    changed = changed_settings(recipe)
    own = [key for key in changed if key.startswith("quantize.roles.")]
    if len(own) > _MANY:
        settings["quantize.roles"] = f"{len(own)} overrides ({EVIDENCE})"
        changed = {key: values for key, values in changed.items() if key not in own}
    settings |= {
        key: f"{value} (published recipe: {published})" for key, (value, published) in changed.items()
    }
    call = {k: v for k, v in source.generation.items() if k in _CALL}
    prompts = source.prompts or source.classes or ["a red fox runs through snow"]
    dtype = next(iter(_compressed(pipe).values())).dtype
    use: dict[str, Any] = {"alone": type(pipe.vae).__name__} if source.alone else {
        "pipeline_tag": "text-to-video" if makes_videos(pipe) else "text-to-image", "by_class": by_class(pipe),
    }  # fmt: skip
    return ModelCard(
        name=name, base_model=source.name, recipe=recipe.name, bits=recipe.bits, attar_version=__version__, **use,
        fps=source.fps, dtype="float32" if dtype == torch.float32 else "bfloat16",
        call=call, settings=settings, sizes=sizes, plan=plan_rows(plans, recipe), **_license(source),
        example_prompt=prompts[0],
    )  # fmt: skip


def _license(source: Source) -> dict[str, Any]:
    """What the source's own model card says of its licence in its front matter."""
    path = None if source.folder is None else source.folder / "README.md"
    if path is None or not path.is_file():
        return {}
    start, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        front = None if start.strip() else yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}  # a card that people wrote by hand; nothing depends on it
    front = front if isinstance(front, dict) else {}
    keys = ("license", "license_name", "license_link")
    return {key: front[key] for key in keys if isinstance(front.get(key), str)}
