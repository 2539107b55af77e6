"""A pipeline whose weights stay in its folder: models on the meta device that read one block at a time.

Transformers and text encoders run as they do in memory, to the same bits, from their shards. Autoencoders get no
weights, since latents are all that is traced, unless they are what is worked on.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn

from attar.errors import AttarError
from attar.models.adapter import ModelAdapter
from attar.models.components import (
    check_complete,
    component_classes,
    empty_model,
    is_denoiser,
    is_transformers,
    load_complete,
    missing,
)
from attar.models.shards import Shards
from attar.models.source import (
    Source,
    check_device,
    check_weight_files,
    default_dtype,
    is_compressed,
    load_part,
    loading,
)
from attar.models.weights import StoredWeights, StreamedWeights, Turn

_WHOLE = "Load it whole with --no-stream"


def streamed_pipeline(
    source: Source, *, dtype: torch.dtype | None = None, device: str | None = None, decodes: bool = False
) -> Any:
    """The pipeline of a local folder, of which only what lies outside the blocks is in memory.

    dtype and device are what the blocks are opened in, with the defaults of `load_pipeline`. A text encoder whose
    files name their tensors otherwise than the model is loaded whole, and with `decodes` so is an autoencoder. Raises
    AttarError where a transformer cannot be streamed, and for all that `load_pipeline` refuses.
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
        pipeline, classes, rest = component_classes(source.folder)
        for name, cls in classes.items():
            folder = source.folder / name
            if not _has_weights(cls):
                parts[name] = cls.from_pretrained(folder)
                continue
            model, shards = empty_model(cls, folder, dtype), Shards(folder)
            if is_denoiser(name):
                StreamedWeights(model, [b.name for b in ModelAdapter.of(model).blocks], shards, where, turn)
            elif is_transformers(cls):
                if missing(model, shards):
                    model = load_complete(cls, folder, dtype=dtype).to(device)
                else:
                    StreamedWeights(model, layer_names(model), shards, where, turn)
            elif decodes:
                model = load_part(cls, folder, dtype, device)
            else:
                check_complete(model, folder)
                StoredWeights(model, shards)
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
    if source.alone:
        return "it is one autoencoder"
    if is_compressed(source.folder):
        return "the model is already compressed"
    with loading(source):
        try:
            _, classes, _ = component_classes(source.folder)
        except (AttributeError, ImportError) as error:
            return f"{error}"
        for name, cls in classes.items():
            if is_denoiser(name):
                shards = Shards(source.folder / name)
                if not shards:
                    return f"{name} has no safetensors file"
                lacking = missing(empty_model(cls, source.folder / name, torch.float32), shards)
                if lacking:
                    return f"the files of {name} have no tensor {lacking[0]!r}"
    return None


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


def _has_weights(cls: Any) -> bool:
    return issubclass(cls, nn.Module)
