"""What makes two runs the same job: a fingerprint of the model, whether it is in memory or in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attar.models.shards import Shards

# where a model lies, and what wrote it; diffusers keeps the last entry in a random order
_NO_IDENTITY = ("_name_or_path", "transformers_version", "_diffusers_version", "_use_default_values")
_ENDS = 1 << 16  # bytes read at either end of a tensor: a 14B model is recognised in seconds


def pipeline_fingerprint(pipe: Any) -> str:
    """Hash of the pipeline's class and own settings, its components' configs, and samples of all their weights."""
    digest = hashlib.sha256(type(pipe).__name__.encode())
    digest.update(_plain(getattr(pipe, "config", {})).encode())
    for name, component in sorted(pipe.components.items()):
        config = getattr(component, "config", None)
        if config is not None:
            entries = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            digest.update(f"{name}{_said(entries)}".encode())
        if isinstance(component, nn.Module):
            for key, tensor in component.state_dict().items():
                digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
                flat = tensor.detach().reshape(-1)
                count = max(1, _ENDS // max(1, tensor.element_size()))
                for part in (flat[:count], flat[-count:]):
                    digest.update(part.contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def folder_fingerprint(folder: Path, dtype: torch.dtype) -> str:
    """The same of a pipeline's folder that is worked on in `dtype`, or of one model's own, without loading anything."""
    index: dict[str, Any] = {".": None}
    if (folder / "model_index.json").is_file():
        index = _json(folder / "model_index.json")
    digest = hashlib.sha256(f"{index.get('_class_name')}{dtype}{_plain(index)}".encode())
    for name in sorted(index):
        part = folder / name
        if (part / "config.json").is_file():
            digest.update(f"{name}{_said(_json(part / 'config.json'))}".encode())
        elif name != "." and part.is_dir():  # a scheduler, a tokenizer
            for path in sorted(p for p in part.iterdir() if p.is_file()):
                known = path.name.endswith("config.json")
                content = _said(_json(path)).encode() if known else path.read_bytes()
                digest.update(f"{name}/{path.name}".encode() + content)
        shards = Shards(part)
        for key in sorted(shards):
            entry = shards.entry(key)
            digest.update(f"{key}{entry.dtype}{entry.shape}".encode())
            for end in shards.ends(key, _ENDS):
                digest.update(end)
        if not shards and part.is_dir():
            for path in sorted(part.glob("*.bin")):  # the older format: what can be read without loading it
                digest.update(f"{path.name}{path.stat().st_size}".encode())
                with open(path, "rb") as file:
                    digest.update(file.read(_ENDS))
                    file.seek(-min(_ENDS, path.stat().st_size), 2)
                    digest.update(file.read())
    return digest.hexdigest()


def _plain(index: Mapping[str, Any]) -> str:
    """The settings of a pipeline itself, which are no components (Wan 2.2's boundary_ratio), as text."""
    return _said(
        {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, (list, tuple))}
    )


def _said(entries: Mapping[str, Any]) -> str:
    return json.dumps(
        {k: v for k, v in entries.items() if k not in _NO_IDENTITY}, sort_keys=True, default=str
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
