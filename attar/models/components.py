"""The components of a pipeline's folder: their classes, their models without weights, and whether their files hold
every tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from attar.errors import AttarError
from attar.models.shards import Shards
from attar.models.weights import tied_names


def is_denoiser(name: str) -> bool:
    """Whether a component of that name denoises: `transformer`, `transformer_2` of two-stage models, or `unet`."""
    return name.startswith("transformer") or name == "unet"


def component_classes(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(class of the pipeline, classes of its components, its other arguments), read from model_index.json.

    Put together by hand, since diffusers' own loader reads components anew that a pipeline declares as optional, such
    as Wan's transformers, when they are given to it. AttributeError or ImportError for classes that it does not know.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    classes, rest = {}, {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(value, list):
            rest[name] = value
        elif value[0] is None:
            rest[name] = None
        else:
            classes[name] = getattr(import_module(value[0]), value[1])
    return getattr(import_module("diffusers"), index["_class_name"]), classes, rest


def is_transformers(cls: Any) -> bool:
    return hasattr(cls, "_from_config")


def empty_model(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model of a component's configuration on the meta device, in evaluation mode, its stored tensors in the types
    that from_pretrained gives them."""
    with _default_dtype(dtype), init_empty_weights():
        if is_transformers(cls):
            model = cls._from_config(cls.config_class.from_pretrained(folder))
        else:
            config = cls.load_config(folder)
            found = config.get("_class_name", cls.__name__)
            if found != cls.__name__:
                raise ValueError(f"{folder.name} is a {found}, model_index.json says {cls.__name__}")
            model = cls.from_config(config)
    if is_transformers(cls):
        model.tie_weights()  # each parameter became one of its own on the way to the meta device
    kept = _kept_in_float32(model, dtype)
    # buffers that are not stored keep their types
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return model.eval().requires_grad_(False)


def missing(model: nn.Module, shards: Shards) -> list[str]:
    """Tensors of the model that its files do not hold under their names, in the same shapes."""
    aliases = tied_names(model, shards)
    return [
        name
        for name, tensor in model.state_dict().items()
        if name not in aliases and (name not in shards or shards.entry(name).shape != tuple(tensor.shape))
    ]


def check_complete(model: nn.Module, folder: Path) -> None:
    """Raises AttarError if a tensor of a component is not in its files, which the libraries only warn of.

    The headers tell. Where names in them differ from the model's, the library that knows the old names decides.
    """
    if missing(model, Shards(folder)):
        load_complete(type(model), folder)


def load_complete(cls: Any, folder: Path, **options: Any) -> Any:
    """`from_pretrained`, with an AttarError where it would leave a tensor without its value."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise AttarError(
            f"tensor {lacking[0]!r} is missing from the weight files",
            where=folder.name,
            fix="Copy or download them again",
        )
    return model


def _kept_in_float32(model: Any, dtype: torch.dtype) -> set[str]:
    """Parts of names whose parameters the libraries keep in float32 in a model of lower precision."""
    if dtype == torch.float32:
        return set()
    if not is_transformers(type(model)):
        return set(model._keep_in_fp32_modules or ())
    half = model._keep_in_fp32_modules if dtype == torch.float16 else ()
    return {*(half or ()), *(model._keep_in_fp32_modules_strict or ())}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
