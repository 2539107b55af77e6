"""How a packed layer is quantized, as the fields of a checkpoint, and which of them go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from torch import Tensor

from attar.errors import AttarError
from attar.runtime.formats import check_format, integer_range
from attar.runtime.packing import packed_width
from attar.runtime.rows import RowKind, kinds_of

LEVELS = ("layer", "row", "group")  # what has a table of numbers of its own
# fields that version 2 of the format brought, left out where a layer has none of it
LATER: dict[str, tuple[type, ...]] = {
    "weight_format": (str,),
    "act_format": (str,),
    "levels": (str,),
    "low_rank": (int,),
    "rows": (list,),
    "act_groups": (list,),
    "frame_gate": (int,),
    "clip_groups": (int,),
}
MIXED_ROWS = "rows"  # of version 4
ACT_GROUPS = "act_groups"  # of version 6
FRAME_GATE = "frame_gate"  # of version 7
CLIP_GROUPS = "clip_groups"  # of version 8
LATER_TRANSFORMS = ("block_rotations",)


def later_fields(
    weight_format: str,
    act_format: str,
    levels: Tensor | None,
    low_rank: int,
    rows: Sequence[RowKind] | None,
    act_groups: Sequence[int] | None,
    frame_gate: int | None = None,
    clip_groups: int | None = None,
) -> dict[str, Any]:
    """Those that a layer needs. Kinds of rows tell of the levels themselves."""
    found = {
        "weight_format": weight_format if weight_format != "int" else None,
        "act_format": act_format if act_format != "int" else None,
        "levels": None if levels is None or rows else levels_of(levels),
        "low_rank": low_rank or None,
        "rows": [list(astuple(kind)) for kind in rows] if rows else None,
        ACT_GROUPS: None if act_groups is None else list(act_groups),
        FRAME_GATE: frame_gate,
        CLIP_GROUPS: clip_groups,
    }
    return {key: value for key, value in found.items() if value is not None}


def levels_of(levels: Tensor) -> str:
    """What has a table of its own among levels (1 or out, 1 or groups, 2^bits)."""
    rows, groups = levels.shape[:2]
    return "group" if groups > 1 else "row" if rows > 1 else "layer"


def table_shape(levels: str, out_features: int, groups: int) -> tuple[int, int]:
    """Rows and groups of the tables."""
    return {"layer": (1, 1), "row": (out_features, 1), "group": (out_features, groups)}[levels]


def check_scheme(
    weight_bits: int, act_bits: int | None, act_clip: bool, group_size: int | None, in_features: int
) -> None:
    packed_width(in_features, weight_bits)
    if act_bits is None:
        if act_clip:
            raise AttarError("activation clipping needs activation quantization", fix="Set act_bits")
    else:
        if act_bits > 8:
            raise AttarError(f"cannot run {act_bits}-bit activations", fix="Choose between 2 and 8 bits")
        integer_range(act_bits)
    if group_size is not None:
        if group_size < 1 or in_features % group_size:
            raise AttarError(f"group size {group_size} does not divide the input width {in_features}")
        if act_bits is not None:
            raise AttarError(
                "group scales cannot be combined with activation quantization",
                fix="Use one scale per output channel, or keep the activations in floating point",
            )


def check_formats(
    weight_format: str,
    weight_bits: int,
    act_format: str,
    act_bits: int | None,
    levels: str | None,
    low_rank: int,
    frame_gate: int | None = None,
) -> None:
    check_format(weight_format, weight_bits)
    if act_format == "table":
        raise AttarError("activations have no tables", fix="Choose int or fp8")
    if act_bits is not None:
        check_format(act_format, act_bits)
    elif act_format != "int":
        raise AttarError("an activation format needs activation quantization", fix="Set act_bits")
    if (weight_format == "table") != (levels in LEVELS):
        raise AttarError(f"weights of the format {weight_format!r} cannot have levels of each {levels!r}")
    if low_rank < 0:
        raise AttarError(f"a branch cannot have rank {low_rank}")
    if frame_gate is not None and (frame_gate < 1 or not low_rank):
        raise AttarError(f"a branch of rank {low_rank} cannot have a gate over {frame_gate} frames")


def check_mixed(
    rows: Sequence[Any], out_features: int, weight_bits: int, weight_format: str, group_size: int | None
) -> list[RowKind]:
    """The kinds of rows of a layer that has several. Raises AttarError where they do not fit the rest of it."""
    kinds = kinds_of(rows)
    if sum(kind.count for kind in kinds) != out_features:
        raise AttarError(f"kinds of {[kind.count for kind in kinds]} rows are not {out_features} rows")
    if max(kind.bits for kind in kinds) != weight_bits:
        raise AttarError(f"the widest rows have {max(kind.bits for kind in kinds)} bits, not {weight_bits}")
    if weight_format != "int" or group_size is not None:
        raise AttarError("rows of several kinds have formats of their own, and one scale each")
    return kinds
