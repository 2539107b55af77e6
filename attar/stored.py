"""What the workspace keeps of a transformer's blocks: packed layers, and the streams on the way to the next block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.errors import AttarError
from attar.models.block import BlockCall
from attar.quantize.linear import replace_module
from attar.runtime.layers import PackedLinear
from attar.runtime.patches import open_layers, split_sizes
from attar.workspace import Workspace

OUTSIDE = "outside.safetensors"  # packed layers that are in no block


def block_file(index: int) -> str:
    """Name of a finished block in the workspace's folder of its component."""
    return f"block-{index:03d}.safetensors"


def save_block(
    workspace: Workspace, file: str, layers: Mapping[str, PackedLinear], result: dict[str, Any]
) -> None:
    """The packed layers of one block by their names in it, and what its compression gave. The first process writes."""
    if not ranks.is_first():
        return
    tensors = {f"{name}.{k}": v for name, layer in layers.items() for k, v in layer.state_dict().items()}
    shapes = {
        name: {
            "scheme": layer.scheme(), "in": layer.in_features, "out": layer.out_features,
            "bias": layer.bias is not None, "dtype": str(layer.compute_dtype).removeprefix("torch."),
        }
        for name, layer in layers.items()
    }  # fmt: skip
    workspace.write_tensors(file, tensors, {"layers": shapes, "result": result})


def restore_block(workspace: Workspace, file: str, module: nn.Module) -> dict[str, Any]:
    """Puts layers like the stored ones into the block, on the meta device; `read_layers` gives their tensors.

    Returns the result that was saved with them.
    """
    _, meta = _read(workspace, file)
    widths = {name: shape["in"] for name, shape in meta["layers"].items()}
    open_layers(module, widths, split_sizes(widths))
    for name, shape in meta["layers"].items():
        layer = PackedLinear.from_scheme(
            shape["scheme"],
            shape["in"],
            shape["out"],
            shape["bias"],
            device="meta",
            dtype=getattr(torch, shape["dtype"]),
        )
        replace_module(module, name, layer.requires_grad_(False))
    return meta["result"]


def read_layers(workspace: Workspace, file: str) -> dict[str, Tensor]:
    """The tensors of the packed layers of one block, by their names in it."""
    return _read(workspace, file)[0]


def read_result(workspace: Workspace, file: str) -> dict[str, Any]:
    """What was saved with the layers of one block."""
    return _read(workspace, file)[1]["result"]


def _read(workspace: Workspace, file: str) -> tuple[dict[str, Tensor], Any]:
    stored = workspace.read_tensors(file)
    if stored is None:
        raise AttarError("the file is missing", where=str(workspace.folder / file), fix="Run again")
    return stored


def write_boundary(
    workspace: Workspace, file: str, full: list[BlockCall], quantized: list[BlockCall] | None
) -> None:
    """The streams that enter a block: in full precision, and behind the quantized blocks where these are learned on.

    Each process writes the samples that it holds. The first one's file, which says how many there are, comes last.
    """
    start, _ = ranks.place(len(full))
    tensors = {
        f"{path}.{start + i}.{name}": tensor
        for path, calls in (("full", full), ("quantized", quantized or []))
        for i, call in enumerate(calls)
        for name, tensor in call.streams.items()
    }
    if not ranks.is_first():
        workspace.write_tensors(_part(file, ranks.rank()), tensors)
    ranks.barrier()
    if ranks.is_first():
        workspace.write_tensors(file, tensors, {"parts": ranks.size()})


def read_boundary(
    workspace: Workspace, file: str, full: list[BlockCall], quantized: list[BlockCall]
) -> tuple[list[BlockCall], list[BlockCall]]:
    """Calls of the same segment with the streams that were stored; without quantized ones both are the same.

    However many processes have written it, each gets its own samples.
    """
    start, _ = ranks.place(len(full))
    own = range(start, start + len(full))
    found: dict[str, dict[int, dict[str, Tensor]]] = {"full": {}, "quantized": {}}
    part, parts = 0, 1
    while part < parts:
        tensors, meta = _read(workspace, _part(file, part))
        parts = meta["parts"] if part == 0 else parts
        for key, tensor in tensors.items():
            path, index, name = key.split(".", 2)
            if int(index) in own:
                found[path].setdefault(int(index), {})[name] = tensor
        part += 1
    try:
        full = [call.with_streams(found["full"][i]) for i, call in zip(own, full, strict=True)]
        if not found["quantized"]:
            return full, full
        behind = zip(own, quantized, strict=True)
        return full, [call.with_streams(found["quantized"][i]) for i, call in behind]
    except KeyError as error:
        where = str(workspace.folder / file)
        raise AttarError(
            "samples are missing in the file", where=where, fix="Delete it and run again"
        ) from error


def remove_boundary(workspace: Workspace, file: str) -> None:
    """Removes it with all its parts."""
    if ranks.is_first():
        workspace.remove(file)
        for path in workspace.folder.glob(_part(file, "*")):
            path.unlink(missing_ok=True)


def _part(file: str, number: int | str) -> str:
    return file if number == 0 else file.replace(".safetensors", f".{number}.safetensors")
