"""Rows of one weight in several widths and formats: an output channel's own bits, at a fixed mean.

The rows of one kind lie together, kind after kind and inside a kind in their own order, each row packed as ever. What
is stored beside the codes is one byte for each row, the number of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from attar.errors import AttarError
from attar.runtime.formats import check_format, check_levels
from attar.runtime.packing import pack, packed_width

ROW_FORMATS = ("int", "table")  # a table is each row's own
MAX_KINDS = 8


@dataclass(frozen=True)
class RowKind:
    """`count` rows of `bits` bits in a number format (formats.py)."""

    bits: int
    number: str
    count: int

    @property
    def entries(self) -> int:
        """Levels of a row."""
        return 1 << self.bits if self.number == "table" else 0


class Rows(NamedTuple):  # made at every call of a layer
    """The rows of one kind: their places among all (None: they are all), codes (count, width), levels."""

    kind: RowKind
    places: Tensor | None
    codes: Tensor
    levels: Tensor | None

    @overload
    def of(self, whole: Tensor) -> Tensor: ...
    @overload
    def of(self, whole: Tensor | None) -> Tensor | None: ...
    def of(self, whole: Tensor | None) -> Tensor | None:
        """What a tensor (out, …) of all rows has for these."""
        return whole if whole is None or self.places is None else whole[self.places]


def kinds_of(listed: Sequence[Any]) -> list[RowKind]:
    """From the list of a checkpoint, [[bits, number, count], …]. Raises AttarError for anything else."""
    kinds = []
    for row in listed:
        fits = isinstance(row, (list, tuple)) and len(row) == 3 and row[1] in ROW_FORMATS
        if not fits or any(type(n) is not int or n < 1 for n in (row[0], row[2])):
            raise AttarError(f"{row!r} does not say what rows are: bits, int or table, and how many")
        check_format(row[1], row[0])
        if row[0] > 8:
            raise AttarError(f"cannot pack {row[0]}-bit codes", fix="Choose between 1 and 8 bits")
        kinds.append(RowKind(*row))
    if not 1 <= len(kinds) <= MAX_KINDS:
        raise AttarError(f"a weight has 1 to {MAX_KINDS} kinds of rows, not {len(kinds)}")
    return kinds


def sizes(kinds: Sequence[RowKind], in_features: int) -> tuple[int, int]:
    """(bytes of the codes, numbers in the tables) of all rows."""
    codes = sum(kind.count * packed_width(in_features, kind.bits) for kind in kinds)
    return codes, sum(kind.count * kind.entries for kind in kinds)


def pack_rows(codes: Tensor, row_kind: Tensor, kinds: Sequence[RowKind]) -> Tensor:
    """codes int8 (out, in), each row in the range of its kind's bits -> uint8 (bytes,). row_kind: (out,)."""
    parts = [pack(codes[row_kind == i], kind.bits).flatten() for i, kind in enumerate(kinds)]
    return torch.cat(parts)


def split_rows(
    codes: Tensor, row_kind: Tensor, kinds: Sequence[RowKind], in_features: int, levels: Tensor | None
) -> list[Rows]:
    """The kinds' rows, as views of the packed codes (bytes,) and of the levels (numbers,)."""
    order = row_kind.argsort(stable=True)
    found, start, first, entry = [], 0, 0, 0
    for kind in kinds:
        width = packed_width(in_features, kind.bits)
        own = codes[start : start + kind.count * width].view(kind.count, width)
        table = None
        if kind.entries and levels is not None:
            end = entry + kind.count * kind.entries
            table = levels[entry:end].view(kind.count, 1, kind.entries)
            entry = end
        found.append(Rows(kind, order[first : first + kind.count], own, table))
        start, first = start + kind.count * width, first + kind.count
    return found


def check_rows(row_kind: Tensor, kinds: Sequence[RowKind], levels: Tensor | None) -> None:
    """Raises AttarError where the rows are not those that the kinds say, or the levels are no tables of them."""
    if row_kind.dtype != torch.uint8:
        raise AttarError(f"the kinds of rows are {row_kind.dtype}, not uint8")
    entries = sum(kind.count * kind.entries for kind in kinds)
    if (0 if levels is None else levels.numel()) != entries:
        raise AttarError(
            f"the rows have tables of {entries} levels, and there are {levels if levels is None else levels.numel()}"
        )
    counts = torch.bincount(row_kind.long(), minlength=len(kinds)).tolist()
    if counts != [kind.count for kind in kinds]:
        raise AttarError("the kinds of the rows do not fit the layer")
    entry = 0
    for kind in kinds:
        if kind.entries and levels is not None:
            end = entry + kind.count * kind.entries
            check_levels(levels[entry:end].view(kind.count, kind.entries), kind.bits)
            entry = end
