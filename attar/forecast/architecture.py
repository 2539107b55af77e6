"""A pipeline's architecture without its weights: components on the meta device, and the sizes it is made for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from attar.errors import AttarError, reason
from attar.models.source import find_source
from attar.models.zoo import zoo_names
from attar.runtime.checkpoint import QUANT_METHOD

_CONFIG_KEYS = {"_class_name", "_diffusers_version", "_name_or_path"}


@dataclass
class Architecture:
    """Modules of a pipeline on the meta device, in bfloat16.

    default: width, height, frames, steps, text_tokens, template_tokens, guidance, as far as known. pipeline: those
    entries of model_index.json that decide how the transformer is called.
    """

    name: str
    title: str
    transformers: dict[str, nn.Module]
    vae: nn.Module | None = None
    text_encoders: dict[str, nn.Module] = field(default_factory=dict)
    default: dict[str, Any] = field(default_factory=dict)
    pipeline: dict[str, Any] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, nn.Module]:
        decoder = {} if self.vae is None else {"vae": self.vae}
        return {**self.transformers, **decoder, **self.text_encoders}


def shape_names() -> list[str]:
    """Names of the real models whose configs come with attar."""
    return [name for name in _shapes() if not name.startswith(".")]


def find_architecture(model: str, compressed: bool = False) -> Architecture:
    """By a real shape's name, a built-in model's name, or a local diffusers folder; nothing is downloaded.

    compressed: take a compressed folder too, as the architecture that it was before.
    Raises AttarError for an unknown name, a folder without configs, and classes that do not exist here.
    """
    if model in shape_names():
        entry = _shapes()[model]
        return _architecture(
            model, entry["title"], entry["components"], entry["default"], entry.get("pipeline", {})
        )
    if model not in zoo_names() and not Path(model).exists():
        names = ", ".join([*zoo_names(), *shape_names()])
        fix = f"Give a local diffusers folder, or one of: {names}"
        if model.count("/") == 1 and not model.startswith((".", "/", "~")):
            fix += f". Of a model on the hub its configs are enough: hf download {model} --include '*.json'"
        raise AttarError("no such model", where=model, fix=fix)
    source = find_source(model)
    assert source.folder is not None
    index = _json(source.folder / "model_index.json")
    if "unet" in index:
        raise AttarError(
            "plans are for transformers, and the model is a U-Net",
            where=model,
            fix="See attar compress --dry-run, which loads the model",
        )
    components = {}
    for name, entry in index.items():
        wanted = name.startswith(("transformer", "text_encoder")) or name == "vae"
        if wanted and isinstance(entry, list) and len(entry) == 2 and all(entry):
            config = _json(source.folder / name / "config.json")
            if compressed:
                config.pop("quantization_config", None)
            components[name] = [*entry, config]
    renamed = {
        "num_frames": "frames", "num_inference_steps": "steps", "max_sequence_length": "text_tokens",
        "height": "height", "width": "width",
    }  # fmt: skip
    default = {renamed[k]: v for k, v in source.generation.items() if k in renamed}
    if "guidance_scale" in source.generation:
        default["guidance"] = source.generation["guidance_scale"] > 1
    plain = {k: v for k, v in index.items() if not isinstance(v, list) and not k.startswith("_")}
    return _architecture(model, str(index.get("_class_name", model)), components, default, plain)


def build(library: str, class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """A module of diffusers or transformers from its config, on the meta device, in bfloat16 and evaluation mode.

    Raises AttarError when there is no such class, or it does not take the config.
    """
    if library not in ("diffusers", "transformers"):
        raise AttarError(f"a component of the library {library!r} cannot be planned", where=class_name)
    kind = getattr(import_module(library), class_name, None)
    if kind is None:
        raise AttarError(f"{library} has no such class", where=class_name, fix=f"Update {library}")
    given = {k: v for k, v in config.items() if k not in _CONFIG_KEYS}
    try:
        with torch.device("meta"):
            if library == "diffusers":
                module = kind.from_config(given)
            else:
                module = kind(kind.config_class.from_dict(given))
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise AttarError(f"the config does not fit ({reason(error)})", where=class_name) from error
    return module.to(torch.bfloat16).eval()


def _architecture(
    name: str, title: str, components: Mapping[str, Any], default: dict[str, Any], pipeline: dict[str, Any]
) -> Architecture:
    for part, (_, _, config) in components.items():
        if isinstance(config.get("quantization_config"), dict):
            method = config["quantization_config"].get("quant_method")
            what = "already compressed" if method == QUANT_METHOD else f"quantized already ({method})"
            raise AttarError(f"the model is {what}", where=f"{name}/{part}", fix="Plan the original")
    modules = {part: build(*entry) for part, entry in components.items()}
    transformers = {k: m for k, m in modules.items() if k.startswith("transformer")}
    if not transformers:
        raise AttarError("the pipeline has no transformer component", where=name)
    encoders = {k: m for k, m in modules.items() if k.startswith("text_encoder")}
    return Architecture(
        name, title, transformers, modules.get("vae"), encoders, dict(default), dict(pipeline)
    )


def _json(path: Path) -> dict[str, Any]:
    where = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise AttarError("the config is missing", where=where, fix="Give a whole diffusers folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AttarError("the config is not valid JSON", where=where) from error
    if not isinstance(content, dict):
        raise AttarError("the config is no mapping", where=where)
    return content


@cache
def _shapes() -> dict[str, Any]:
    text = (resources.files("attar.forecast") / "shapes.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
