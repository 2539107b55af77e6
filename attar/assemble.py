"""Puts the finished files of a compressed component together, a few tensors at a time.

Packed layers come from the workspace, everything else from the files of the source, in the types that it has there.
So neither the model nor its compressed form is ever in memory as a whole, and a pipeline that was in memory gives the
same files as one that was streamed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.models.shards import Shards
from attar.runtime.integrity import header_metadata, tensor_checksum
from attar.runtime.layers import packed_layers
from attar.runtime.patches import dense_biases, stored_type
from attar.stored import read_layers
from attar.tensorfile import TensorWriter
from attar.workspace import Workspace

SHARD_BYTES = 10_000_000_000  # as diffusers' save_pretrained splits


@dataclass(frozen=True)
class Packed:
    """A file of the workspace with packed layers, whose names there follow `prefix` in the model."""

    file: str
    prefix: str


def write_weights(
    model: nn.Module,
    packed: Iterable[Packed],
    workspace: Workspace,
    shards: Shards,
    folder: Path,
    stem: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the weight files of a model with packed layers into `folder`, with checksums in their headers.

    model: a marked one (`mark_compressed`), which says what tensors there are; they may be on the meta device if
    `packed` and `shards` have them.
    stem: "diffusion_pytorch_model", or "model" for transformers. Raises AttarError for a tensor that is nowhere.
    """
    state = model.state_dict()
    former = dense_biases(model)  # names that a convolution's bias had in the source

    def stored(key: str) -> str:
        return former.get(key, key)

    packed_parts = packed_layers(model)
    layers = tuple(f"{name}." for name in packed_parts)
    floating = {f"{n}.{leaf}": n for n, layer in packed_parts.items() for leaf, _ in layer.named_parameters()}
    types = {name: shards.entry(name).dtype for name in shards}
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    # of several tensors that are tied transformers stores one
    tied = getattr(model, "all_tied_weights_keys", ())
    for key, tensor in state.items():
        if stored(key) in shards:
            kinds[key] = shards.entry(stored(key)).dtype, tuple(tensor.shape)
        elif key in floating:  # a branch, or a bias where there was none: in the type that the weight had
            kinds[key] = stored_type(floating[key], types, tensor.dtype), tuple(tensor.shape)
        elif key in tied:
            continue
        elif key.startswith(layers) or not tensor.is_meta:
            kinds[key] = tensor.dtype, tuple(tensor.shape)
    parts = split(kinds, shard_bytes)
    names = shard_names(stem, len(parts))
    sums = dict.fromkeys(sorted(kinds), "0" * 64)
    quantizer: Any = model.hf_quantizer
    config = quantizer.quantization_config.to_dict()
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                TensorWriter(folder / name, {key: kinds[key] for key in part}, _metadata(sums, config))
            )
            for name, part in zip(names, parts, strict=True)
        ]
        home = {key: writer for writer, part in zip(writers, parts, strict=True) for key in part}

        def write(key: str, tensor: Tensor) -> None:
            tensor = tensor.to(kinds[key][0])
            sums[key] = tensor_checksum(tensor)
            home.pop(key).write(key, tensor)

        for source in packed:
            for name, tensor in read_layers(workspace, source.file).items():
                key = source.prefix + name
                if stored(key) in shards:  # a bias: the source's own, unless it was trained or shifted
                    original = shards.read(stored(key))
                    tensor = original if torch.equal(original.to(tensor.dtype), tensor) else tensor
                write(key, tensor)
        for key in list(home):
            known = stored(key) in shards
            if not known and state[key].is_meta:
                raise AttarError(
                    "a tensor is neither in the workspace nor in the source", where=key, fix="Run again"
                )
            write(key, shards.read(stored(key)) if known else state[key])
        for writer in writers:
            writer.finish(_metadata(sums, config))
    if len(parts) > 1:
        write_index(folder / f"{stem}.safetensors.index.json", kinds, dict(zip(names, parts, strict=True)))


def _metadata(sums: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", **header_metadata(sums, config)}


def _bytes(kind: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return torch.empty(kind[1], dtype=kind[0], device="meta").nbytes


def split(kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], most: int) -> list[list[str]]:
    """The names in their order, in parts of at most `most` bytes unless one tensor is larger."""
    parts: list[list[str]] = [[]]
    room = most
    for key, kind in kinds.items():
        if _bytes(kind) > room and parts[-1]:
            parts.append([])
            room = most
        parts[-1].append(key)
        room -= _bytes(kind)
    return parts


def shard_names(stem: str, count: int) -> list[str]:
    """Names of the weight files of a component."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(
    path: Path,
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    parts: Mapping[str, list[str]],
) -> None:
    """The index of a sharded component. parts: file name -> tensors in it."""
    content = {
        "metadata": {"total_size": sum(map(_bytes, kinds.values()))},
        "weight_map": {key: name for name, keys in parts.items() for key in keys},
    }
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
