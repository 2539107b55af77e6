"""Checksums of a checkpoint, and its verification before a model is built from it.

Every weight file carries, in the metadata of its safetensors header, the SHA-256 of each tensor of the
checkpoint, and one of the quantization config that gives them their meaning. They are computed whenever a
model is saved (by attar or by a plain `save_pretrained`), so they are right whatever the sharding or dtype, and
none can go stale. What attar copies beside them has its sums in compression.json.
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
from attar.runtime.rows import kinds_of
from attar.runtime.scheme import CLIP_GROUPS, FRAME_GATE, MIXED_ROWS
from attar.runtime.transforms import is_shifted

CHECKSUM_KEY = "attar_sha256"
CONFIG_KEY = "attar_config_sha256"
EVIDENCE = "compression.json"
_NO_MEANING = ("attar_version", "recipe")  # where a checkpoint comes from; nothing depends on them
_DAMAGED = "The file is damaged or incomplete: copy or download it again"


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_checksums(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """The checksum of every tensor."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        return dict(zip(state_dict, pool.map(tensor_checksum, state_dict.values()), strict=True))


def header_metadata(sums: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """What goes into the header of each weight file. config: the `quantization_config` that is saved beside it."""
    table = json.dumps(sums, separators=(",", ":"), sort_keys=True)
    return {CHECKSUM_KEY: table, CONFIG_KEY: config_checksum(config)}


def config_checksum(config: Mapping[str, Any]) -> str:
    """SHA-256 of all in a `quantization_config` that says what the tensors mean, however it is laid out."""
    content = {key: value for key, value in config.items() if key not in _NO_MEANING}
    text = json.dumps({**content, "quant_method": QUANT_METHOD}, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files below a folder, by their names there."""
    names = sorted(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _file_checksum(folder / name), names), strict=True))


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


def verify_files(
    files: Iterable[str | os.PathLike[str]], config: Mapping[str, Any]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Reads every tensor of a component's weight files and compares checksums where there are any.

    config: the checked `quantization_config` beside them; it must be the one that they were saved with, and say what
    each tensor of a packed layer is for. Returns the dtype and shape of each tensor. Raises AttarError for a file
    that is missing, truncated or altered, and for files of different saves mixed together.
    """
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    promised: tuple[dict[str, str], str | None] | None = None
    where: str | None = None
    for path in map(Path, files):
        where = path.parent.name
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                table = _table(metadata.get(CHECKSUM_KEY, "{}"), path.name)
                if promised is not None and (table, metadata.get(CONFIG_KEY)) != promised:
                    raise AttarError(
                        "weight files of different saves are mixed", where=path.name, fix=_DAMAGED
                    )
                promised = table, metadata.get(CONFIG_KEY)
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
    table, saved_with = promised or ({}, None)
    missing = sorted(set(table) - set(found))
    if missing:
        raise AttarError(f"tensor {missing[0]!r} is missing from the weight files", fix=_DAMAGED)
    _check_layers(config, found, where)
    if saved_with not in (None, config_checksum(config)):  # None: by an attar that did not write it yet
        raise AttarError(
            "the quantization_config is not the one that the weights were saved with",
            where=f"{where}/config.json",
            fix="Copy or download the checkpoint again",
        )
    return found


def verify_folder(folder: str | os.PathLike[str]) -> list[Path]:
    """Checks every attar checkpoint in a transformer folder, or in a pipeline folder with such components.

    Config, format version, schemes, presence of all files and tensors, checksums; of the components that attar
    copied, the files. Returns the checked folders; raises AttarError, one line, for the first fault, or when there
    is no attar checkpoint at all.
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
    _verify_copies(root)
    return checked


def _table(text: str, where: str) -> dict[str, str]:
    """The checksums of a header by their tensors."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not all(isinstance(digest, str) for digest in table.values()):
        raise AttarError(f"{CHECKSUM_KEY} in the header is no table of checksums", where=where, fix=_DAMAGED)
    return table


def _verify_component(folder: Path, raw: Mapping[str, Any]) -> None:
    verify_files(_weight_files(folder), check_config(raw, where=f"{folder.name}/config.json"))


def _check_layers(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], where: str | None
) -> None:
    """Every packed layer has the tensors of its scheme, and no others."""
    layers, schemes = config["layers"], config["schemes"]
    for name, position in layers.items():
        scheme = schemes[position]
        wanted = ["codes", "weight_scale"] + (["act_clip"] if scheme["act_clip"] else [])
        wanted += ["bias"] if is_shifted(scheme["transforms"]) else []
        mixed = MIXED_ROWS in scheme
        wanted += ["row_kind"] if mixed else []
        wanted += [FRAME_GATE] if FRAME_GATE in scheme else []
        for part in wanted:
            if f"{name}.{part}" not in tensors:
                raise AttarError(f"tensor '{name}.{part}' is missing", where=where, fix=_DAMAGED)
        for i, _ in enumerate(scheme["transforms"]):
            if not any(key.startswith(f"{name}.transforms.{i}.") for key in tensors):
                raise AttarError(f"transform {i} of {name!r} is missing", where=where, fix=_DAMAGED)
        (codes_dtype, codes), (scale_dtype, scale) = (tensors[f"{name}.{part}"] for part in wanted[:2])
        fits = (codes_dtype, scale_dtype) == (torch.uint8, torch.float32) and len(codes) == (
            1 if mixed else 2
        )
        fits &= _rows_fit(scheme, name, tensors) if mixed else codes[:1] == scale[:1]
        if not fits:
            raise AttarError(f"codes and scales of {name!r} do not match", where=where, fix=_DAMAGED)
        if FRAME_GATE in scheme and tensors[f"{name}.{FRAME_GATE}"][1] != (scheme[FRAME_GATE],):
            raise AttarError(
                f"{FRAME_GATE} of {name!r} is not of {scheme[FRAME_GATE]} frames", where=where, fix=_DAMAGED
            )
        groups = scheme.get(CLIP_GROUPS)
        if groups is not None and scheme["act_clip"] and tensors[f"{name}.act_clip"][1] != (groups, 2):
            raise AttarError(
                f"act_clip of {name!r} is not of {groups} groups of steps", where=where, fix=_DAMAGED
            )
    for key, (dtype, _) in tensors.items():
        layer, part = _owner(key, layers)
        if layer is None and key.endswith(".codes") and dtype == torch.uint8:
            packed = key.removesuffix(".codes")
            raise AttarError(f"layer {packed!r} is packed, but config.json does not list it", where=where)
        if layer is not None and not _has_part(schemes[layers[layer]], part):
            raise AttarError(
                f"the scheme of {layer!r} has no tensor {part!r}",
                where=where,
                fix="Copy or download it again",
            )


def _rows_fit(
    scheme: Mapping[str, Any], name: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> bool:
    """Whether there is a kind for each row, and a level for each entry of a table."""
    kinds = kinds_of(scheme[MIXED_ROWS])
    count, entries = (sum(n) for n in ([k.count for k in kinds], [k.count * k.entries for k in kinds]))
    levels = tensors.get(f"{name}.levels", (torch.float16, (0,)))
    rows = tensors[f"{name}.row_kind"] == (torch.uint8, (count,))
    return rows and tensors[f"{name}.weight_scale"][1] == (count, 1) and levels == (torch.float16, (entries,))


def _owner(key: str, layers: Mapping[str, int]) -> tuple[str | None, str]:
    """(the packed layer that a tensor belongs to, its name in there)."""
    pieces = key.split(".")
    for i in range(1, len(pieces)):
        if ".".join(pieces[:i]) in layers:
            return ".".join(pieces[:i]), ".".join(pieces[i:])
    return None, key


def _has_part(scheme: Mapping[str, Any], part: str) -> bool:
    if part.startswith("transforms."):
        index = part.split(".")[1]
        return index.isdecimal() and int(index) < len(scheme["transforms"])
    if part in ("low_rank_in", "low_rank_out"):
        return bool(scheme.get("low_rank"))
    if part in ("act_clip", "levels", "row_kind", FRAME_GATE):
        tables = part == "levels" and any(kind[1] == "table" for kind in scheme.get(MIXED_ROWS, ()))
        return tables or bool(scheme.get(MIXED_ROWS if part == "row_kind" else part))
    return part in ("codes", "weight_scale", "bias")


def _verify_copies(root: Path) -> None:
    """The files that attar copied are as it copied them; their sums are in compression.json, if there is one."""
    path = root / EVIDENCE
    if not path.is_file():
        return
    try:
        promised = dict(json.loads(path.read_text(encoding="utf-8")).get("copied") or {})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AttarError(f"{EVIDENCE} is damaged", where=str(path), fix="Compress again") from error
    for name in promised:
        if not (root / name).is_file():
            raise AttarError("a file is missing", where=name, fix=_DAMAGED)
    for name, digest in file_checksums(root, promised).items():
        if digest != promised[name]:
            fix = f"{_DAMAGED}; if it was changed on purpose, remove its line from `copied` in {EVIDENCE}"
            raise AttarError("the file is not as attar copied it", where=name, fix=fix)


def _quantization_config(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (ValueError, AttributeError, RecursionError) as error:
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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise AttarError(
                "the index of the shards is damaged", where=indexes[0].name, fix=_DAMAGED
            ) from error
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if not files:
        raise AttarError("no weight file", where=str(folder), fix=_DAMAGED)
    return files


def _read(file: Any, name: str) -> tuple[torch.dtype, tuple[int, ...], str]:
    tensor = file.get_tensor(name)
    return tensor.dtype, tuple(tensor.shape), tensor_checksum(tensor)


def _file_checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
