"""Checksums of a checkpoint, and its verification before a model is built from it.

Every weight file carries, in the metadata of its safetensors header, the SHA-256 of each tensor of the
checkpoint. They are computed from the state dict whenever it is saved (by attar or by a plain
`save_pretrained`), so they are right whatever the sharding or dtype, and none can go stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from attar.errors import AttarError
from attar.runtime.checkpoint import QUANT_METHOD, check_config

CHECKSUM_KEY = "attar_sha256"
_DAMAGED = "The file is damaged or incomplete: copy or download it again"


def tensor_checksums(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of every tensor's dtype, shape and bytes."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        return dict(zip(state_dict, pool.map(_checksum, state_dict.values()), strict=True))


def checksum_metadata(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """What goes into the header of each weight file."""
    return {CHECKSUM_KEY: json.dumps(tensor_checksums(state_dict), separators=(",", ":"), sort_keys=True)}


def sort_header(path: str | os.PathLike[str]) -> None:
    """Puts the metadata of a safetensors file into alphabetical order, in place.

    safetensors writes several entries in a random order; this way equal checkpoints are equal files. The tensors
    and the length of the header stay as they are.
    """
    with open(path, "rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        ordered = {"__metadata__": dict(sorted(metadata.items())), **header} if metadata else header
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise AttarError("the header of the file is not as safetensors writes it", where=str(path))
        file.seek(8)
        file.write(text.ljust(length))


def verify_files(files: Iterable[str | os.PathLike[str]]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Reads every tensor of the weight files and compares checksums where there are any.

    Returns the dtype and shape of each tensor. Raises AttarError for a file that is missing, truncated or
    altered, and for files of different saves mixed together.
    """
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    promised: dict[str, str] | None = None
    for path in map(Path, files):
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(CHECKSUM_KEY)
                table = json.loads(text) if text is not None else {}
                if promised is not None and table != promised:
                    raise AttarError(
                        "weight files of different saves are mixed", where=path.name, fix=_DAMAGED
                    )
                promised = table
                names = list(file.keys())
                with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                    for name, result in zip(names, pool.map(lambda n: _read(file, n), names), strict=True):
                        found[name] = result[:2]
                        if table and table.get(name) != result[2]:
                            raise AttarError(f"checksum mismatch of {name!r}", where=path.name, fix=_DAMAGED)
        except FileNotFoundError:
            raise AttarError("weight file is missing", where=str(path), fix=_DAMAGED) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise AttarError(
                f"cannot be read as safetensors ({error})", where=path.name, fix=_DAMAGED
            ) from error
    missing = sorted(set(promised or {}) - set(found))
    if missing:
        raise AttarError(f"tensor {missing[0]!r} is missing from the weight files", fix=_DAMAGED)
    return found


def verify_folder(folder: str | os.PathLike[str]) -> list[Path]:
    """Checks every attar checkpoint in a transformer folder, or in a pipeline folder with such components.

    Config, format version, schemes, presence of all files and tensors, checksums. Returns the checked
    folders; raises AttarError, one line, for the first fault, or when there is no attar checkpoint at all.
    """
    root = Path(folder)
    if not root.is_dir():
        raise AttarError("no such folder", where=str(root))
    candidates = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    checked = []
    for candidate in candidates:
        config = _quantization_config(candidate)
        if config is not None:
            _verify_component(candidate, config)
            checked.append(candidate)
    if not checked:
        raise AttarError("no attar checkpoint here", where=str(root), fix="Name the folder that attar wrote")
    return checked


def _verify_component(folder: Path, raw: Mapping[str, Any]) -> None:
    config = check_config(raw, where=f"{folder.name}/config.json")
    tensors = verify_files(_weight_files(folder))
    for name, position in config["layers"].items():
        scheme = config["schemes"][position]
        wanted = ["codes", "weight_scale"] + (["act_clip"] if scheme["act_clip"] else [])
        for part in wanted:
            if f"{name}.{part}" not in tensors:
                raise AttarError(f"tensor '{name}.{part}' is missing", where=folder.name, fix=_DAMAGED)
        for i, _ in enumerate(scheme["transforms"]):
            if not any(key.startswith(f"{name}.transforms.{i}.") for key in tensors):
                raise AttarError(f"transform {i} of {name!r} is missing", where=folder.name, fix=_DAMAGED)
        (codes_dtype, codes), (scale_dtype, scale) = (tensors[f"{name}.{part}"] for part in wanted[:2])
        if (codes_dtype, scale_dtype) != (torch.uint8, torch.float32) or codes[0] != scale[0]:
            raise AttarError(f"codes and scales of {name!r} do not match", where=folder.name, fix=_DAMAGED)
    for key, (dtype, _) in tensors.items():
        layer = key.removesuffix(".codes")
        if layer != key and dtype == torch.uint8 and layer not in config["layers"]:
            raise AttarError(
                f"layer {layer!r} is packed, but config.json does not list it", where=folder.name
            )


def _quantization_config(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise AttarError(
            f"config.json is not valid JSON ({error})", where=folder.name, fix=_DAMAGED
        ) from error
    ours = isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD
    return config if ours else None


def _weight_files(folder: Path) -> list[Path]:
    stem = "diffusion_pytorch_model"
    if not any(folder.glob(f"{stem}*.safetensors*")):
        stem = "model"  # a text encoder's, by transformers
    indexes = sorted(folder.glob(f"{stem}*.safetensors.index*.json"))
    if indexes:
        try:
            return [
                folder / f for f in sorted(set(json.loads(indexes[0].read_text())["weight_map"].values()))
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AttarError(
                "the index of the shards is damaged", where=indexes[0].name, fix=_DAMAGED
            ) from error
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if not files:
        raise AttarError("no weight file", where=str(folder), fix=_DAMAGED)
    return files


def _read(file: Any, name: str) -> tuple[torch.dtype, tuple[int, ...], str]:
    tensor = file.get_tensor(name)
    return tensor.dtype, tuple(tensor.shape), _checksum(tensor)


def _checksum(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
