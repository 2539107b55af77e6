"""How large a model is: on disk, in its safetensors files, and in memory. All sizes in bytes."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from attar.errors import AttarError
from attar.models.shards import weight_files


def model_size(source: str | Path | nn.Module | Any) -> dict[str, int]:
    """Bytes of weights by part, of a diffusers folder, a pipeline object or one module.

    A folder is read from the headers of its safetensors files ({"transformer": …, "vae": …}), a pipeline from
    its components' parameters and buffers, a module gives {"model": …}. Raises AttarError where nothing is
    found.
    """
    if isinstance(source, nn.Module):
        return {"model": module_bytes(source)}
    if isinstance(source, (str, Path)):
        return safetensors_bytes(source)
    components = getattr(source, "components", None)
    if not isinstance(components, dict):
        raise AttarError(
            f"cannot measure a {type(source).__name__}", fix="Give a folder, a pipeline or a module"
        )
    sizes = {name: module_bytes(part) for name, part in components.items() if isinstance(part, nn.Module)}
    if not sizes:
        raise AttarError(f"the {type(source).__name__} has no component with weights")
    return sizes


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers (packed codes are buffers); shared tensors count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def folder_bytes(folder: str | Path) -> dict[str, int]:
    """Bytes on disk of every file, by first-level subfolder; files beside them are under ".".

    Links are followed, because a hub cache is made of them. Raises AttarError if `folder` is no folder.
    """
    root = _folder(folder)
    sizes: Counter[str] = Counter()
    for parent, _, files in os.walk(root, followlinks=True):
        relative = Path(parent).relative_to(root)
        part = relative.parts[0] if relative.parts else "."
        sizes[part] += sum((Path(parent) / name).stat().st_size for name in files)
    return dict(sizes)


def safetensors_bytes(folder: str | Path) -> dict[str, int]:
    """Bytes of tensors in a folder's safetensors files, by first-level subfolder ("." for files at the top).

    Of a component that has them under the names which are loaded, a variant beside them (`….fp16.safetensors`) does not
    count; one that has no safetensors file counts its older `.bin` files whole. Only headers are read. Raises
    AttarError if there is no such file, or if one is truncated or malformed.
    """
    root = _folder(folder)
    parts = _components(root)
    sizes: Counter[str] = Counter()
    if parts is None:
        for path in sorted(root.rglob("*.safetensors")):
            relative = path.relative_to(root)
            sizes[relative.parts[0] if len(relative.parts) > 1 else "."] += _tensor_bytes(path)
    for part in parts or ():  # a model may bring files that are no part of its pipeline
        found = weight_files(root / part) or sorted((root / part).rglob("*.safetensors"))
        older = [] if found else sorted((root / part).glob("*.bin"))
        if found or older:
            sizes[part] = sum(map(_tensor_bytes, found)) + sum(path.stat().st_size for path in older)
    if not sizes:
        raise AttarError("no safetensors file found", where=str(root), fix="Give a diffusers model folder")
    return dict(sizes)


def _components(root: Path) -> list[str] | None:
    """Names in the pipeline's index; None for a folder without one."""
    index = root / "model_index.json"
    if not index.is_file():
        return None
    try:
        return list(json.loads(index.read_text(encoding="utf-8")))
    except ValueError as error:
        raise AttarError("not valid JSON", where=str(index), fix="Save or download it again") from error


def format_bytes(count: float) -> str:
    """Human-readable size in decimal units, as on model pages: 999 B, 1.5 kB, 2.63 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(count) >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    unit = units[0]
    return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 99.95 else f"{count:.3g} {unit}"


def _folder(folder: str | Path) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise AttarError("no such folder", where=str(folder), fix="Give the folder of a saved model")
    return root


def _tensor_bytes(path: Path) -> int:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        total = max(ends, default=0)
        if 8 + length + total > size:
            raise ValueError("tensor data missing")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise AttarError(
            f"not a whole safetensors file: {error}", where=str(path), fix="Save or download it again"
        ) from error
    return total
