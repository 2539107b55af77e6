"""A pipeline whose weights stay in its folder: models on the meta device that read one block at a time.

Transformers and text encoders run as they do in memory, to the same bits, from their shards. Autoencoders get no
weights, since latents are all that is traced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook
from torch import nn

from attar.errors import AttarError
from attar.models.adapter import ModelAdapter
from attar.models.shards import Shards
from attar.models.source import (
    Source,
    check_device,
    check_weight_files,
    default_dtype,
    is_compressed,
    loading,
)
from attar.models.weights import StreamedWeights, Turn, tied_names

_WHOLE = "Load it whole with --no-stream"


def streamed_pipeline(source: Source, *, dtype: torch.dtype | None = None, device: str | None = None) -> Any:
    """The pipeline of a local folder, of which only what lies outside the blocks is in memory.

    dtype and device are what the blocks are opened in, with the defaults of `load_pipeline`. A text encoder whose
    files name their tensors otherwise than the model is loaded whole. Raises AttarError where a transformer
    cannot be streamed, and for all that `load_pipeline` refuses.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    dtype = dtype or default_dtype(device)
    why = not_streamable(source)
    if why is not None:
        raise AttarError(f"the weights cannot be streamed: {why}", where=source.name, fix=_WHOLE)
    assert source.folder is not None
    check_weight_files(source.folder)
    turn, where, parts = Turn(), torch.device(device), {}
    with loading(source):
        pipeline, classes, rest = _index(source.folder)
        for name, cls in classes.items():
            folder = source.folder / name
            if not _has_weights(cls):
                parts[name] = cls.from_pretrained(folder)
                continue
            model, shards = empty_model(cls, folder, dtype), Shards(folder)
            if name.startswith("transformer"):
                StreamedWeights(model, [b.name for b in ModelAdapter.of(model).blocks], shards, where, turn)
            elif _is_transformers(cls):
                if missing(model, shards):
                    model = cls.from_pretrained(folder, dtype=dtype).to(device)
                else:
                    StreamedWeights(model, layer_names(model), shards, where, turn)
            # diffusers reads off such a hook where an offloaded model computes; nothing is attached by it
            model._hf_hook = AlignDevicesHook(execution_device=where)
            parts[name] = model
        pipe = pipeline(**parts, **rest)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def not_streamable(source: Source) -> str | None:
    """Why the transformers of a source cannot be streamed, or None. Only headers and configs are read."""
    if source.folder is None:
        return "the pipeline was given as an object"
    if is_compressed(source.folder):
        return "the model is already compressed"
    with loading(source):
        try:
            _, classes, _ = _index(source.folder)
        except (AttributeError, ImportError) as error:
            return f"{error}"
        for name, cls in classes.items():
            if name.startswith("transformer"):
                shards = Shards(source.folder / name)
                if not shards:
                    return f"{name} has no safetensors file"
                lacking = missing(empty_model(cls, source.folder / name, torch.float32), shards)
                if lacking:
                    return f"the files of {name} have no tensor {lacking[0]!r}"
    return None


def empty_model(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model of a component's configuration on the meta device, in evaluation mode, its stored tensors in the types
    that from_pretrained gives them."""
    with _default_dtype(dtype), init_empty_weights():
        if _is_transformers(cls):
            model = cls._from_config(cls.config_class.from_pretrained(folder))
        else:
            config = cls.load_config(folder)
            found = config.get("_class_name", cls.__name__)
            if found != cls.__name__:
                raise ValueError(f"{folder.name} is a {found}, model_index.json says {cls.__name__}")
            model = cls.from_config(config)
    if _is_transformers(cls):
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


def layer_names(model: nn.Module) -> list[str]:
    """The parts of a text encoder that are opened one at a time: its layers, and its embeddings beside them."""
    found: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{name}.") for name in found):
            continue
        if isinstance(module, nn.ModuleList):
            found += [f"{path}.{name}" for name, _ in module.named_children()]
        elif isinstance(module, nn.Embedding):
            found.append(path)
    return found


def _index(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
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


def _has_weights(cls: Any) -> bool:
    return issubclass(cls, nn.Module)


def _is_transformers(cls: Any) -> bool:
    return hasattr(cls, "_from_config")


def _kept_in_float32(model: Any, dtype: torch.dtype) -> set[str]:
    """Parts of names whose parameters the libraries keep in float32 in a model of lower precision."""
    if dtype == torch.float32:
        return set()
    if not _is_transformers(type(model)):
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
