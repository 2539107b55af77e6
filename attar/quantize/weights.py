"""What a weight is rounded to while its layer learns: bits, number format, table and clipping, of all rows or by kinds.

Rows of several kinds (attar.runtime.rows) are each rounded by their own kind; the clipping factors are the rows' in any
case. A weight whose rows are all alike has one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.quantize.clip_search import searched_clip
from attar.quantize.formats import (
    clip_weight,
    fake_quantize_weight,
    group_count,
    quantize_weight,
    weight_magnitudes,
    weight_steps,
)
from attar.quantize.tables import (
    check_trained_levels,
    check_weight_format,
    fit_parameters,
    has_own_tables,
    levels_for,
    number_of,
)
from attar.runtime.formats import INTEGER_FORMATS, code_range, decode
from attar.runtime.rows import RowKind


@dataclass(frozen=True)
class Grid:
    """Bits and weight format (tables.py) of rows."""

    bits: int
    weight_format: str = "int"

    @property
    def number(self) -> str:
        return number_of(self.weight_format)

    @property
    def stored(self) -> str:
        """The format of the packed codes: which integers are used is in the sign of their scale."""
        return "int" if self.number in INTEGER_FORMATS else self.number


class _Rows(nn.Module):
    """The rows of one grid: which they are, None for all of them, and the parameters of their table."""

    def __init__(self, grid: Grid, places: Tensor | None) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("places", places, persistent=False)
        self.table: nn.Parameter | None = None

    places: Tensor | None

    @property
    def levels(self) -> Tensor | None:
        """(1 or rows, 1 or groups, 2^bits), exact in half precision; None without a table."""
        return None if self.table is None else levels_for(self.grid.weight_format, self.table, self.grid.bits)

    def of(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The rows' part of a tensor that has all rows along `dim`."""
        return tensor if self.places is None else tensor.index_select(dim, self.places)


class WeightQuantizer(nn.Module):
    """Rounds weights (out, in), one scale for each row, or for each group of `group_size` input channels.

    grid: of all rows, until `mix` gives some of them another. clip_start: logit from which the clipping factors of
    each row and group start, (f_lo, f_hi) = σ(`clip_logit`); None for no clipping. train_levels: whether the parameters
    of tables, such as the exponent of "power", are learned once `fit` has found them.
    Raises AttarError for bits that the format does not have, groups that do not divide the width, and levels that
    cannot be trained.
    """

    def __init__(
        self,
        grid: Grid,
        out_features: int,
        in_features: int,
        group_size: int | None = None,
        clip_start: float | None = None,
        train_levels: bool = False,
    ) -> None:
        super().__init__()
        check_weight_format(grid.weight_format, grid.bits)
        if train_levels:
            check_trained_levels(grid.weight_format)
        self.grid, self.group_size, self.train_levels = grid, group_size, train_levels
        groups = group_count(in_features, group_size)
        self.clip_logit, self.clip_start = None, clip_start
        if clip_start is not None:
            self.clip_logit = nn.Parameter(torch.full((2, out_features, groups), clip_start))
        self.kinds = nn.ModuleList([_Rows(grid, None)])
        self.register_buffer("order", None, persistent=False)

    order: Tensor | None  # where among the kinds, one after another, each row is

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Makes the tables for a weight (out, in)."""
        for rows in self._rows():
            if rows.grid.number == "table":
                clip, size = self._clip(rows), self.group_size
                steps = weight_steps(rows.of(weight), clip, size)
                largest = weight_magnitudes(rows.of(weight), clip, size)
                found = fit_parameters(rows.grid.weight_format, steps, rows.grid.bits, largest)
                rows.table = nn.Parameter(found, self.train_levels)

    @torch.no_grad()
    def search_clip(self, weight: Tensor) -> None:
        """Starts the clipping of each row and group where the weight (out, in) is rounded with the smallest error.

        Nowhere farther out than where clipping starts without a search (clip_search.py). Tables are fitted to what is
        cut. Raises AttarError without clipping.
        """
        if self.clip_logit is None or self.clip_start is None:
            raise AttarError(
                "there is no clipping to search", where="quantize.clip_search", fix="Set weight_clip"
            )
        groups = self.clip_logit.shape[2]
        found = [
            searched_clip(
                rows.of(weight), self.clip_start, rows.grid.bits, groups, rows.grid.number, rows.levels
            )
            for rows in self._rows()
        ]
        self.clip_logit.copy_(self._joined(found).transpose(0, 1))
        self.fit(weight)

    def mix(self, grids: Sequence[Grid], row_grid: Tensor) -> None:
        """Gives row r the grid `grids[row_grid[r]]`; where that is one for all, the rows are of one kind.

        Tables are made by `fit`, which has to be called again.

        row_grid: (out,) integers. Grids that no row has are left out.
        Raises AttarError for groups of input channels, and formats that have one table for all rows or are no tables
        and no integers.
        """
        if self.group_size is not None:
            raise AttarError("rows of several kinds have one scale each", fix="Leave the group size out")
        kinds = []
        for i, grid in enumerate(grids):
            check_row_grid(grid)
            places = (row_grid == i).nonzero()[:, 0]
            if len(places):
                kinds.append(_Rows(grid, places))
        if len(kinds) == 1:
            kinds, self.order = [_Rows(kinds[0].grid, None)], None
        else:
            self.order = torch.cat([kind.places for kind in kinds]).argsort()
        self.kinds = nn.ModuleList(kinds)

    @property
    def mixed(self) -> bool:
        """Whether rows are of several kinds."""
        return self.order is not None

    @property
    def grids(self) -> list[Grid]:
        """Of all kinds of rows."""
        return [rows.grid for rows in self._rows()]

    @property
    def clip(self) -> Tensor | None:
        """Clipping factors (f_lo, f_hi), (2, out, groups); None without."""
        return None if self.clip_logit is None else self.clip_logit.sigmoid()

    @property
    def levels(self) -> Tensor | None:
        """Of all rows, where these are of one kind."""
        return None if self.mixed else self._rows()[0].levels

    def table_parameters(self) -> list[nn.Parameter]:
        """Parameters of tables that are trained."""
        tables = [rows.table for rows in self._rows()]
        return [table for table in tables if table is not None and table.requires_grad]

    # ---------------------------------------------------------------------------------------- rounding

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it will be, differentiable."""

        def fake(rows: _Rows) -> Tensor:
            grid = rows.grid
            return fake_quantize_weight(
                rows.of(weight), grid.bits, self._clip(rows), self.group_size, grid.number, rows.levels
            )

        return self._whole(fake)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (out, in), each row's of its kind, and scales (out, groups), to nearest."""
        found = [
            quantize_weight(
                rows.of(weight), rows.grid.bits, self._clip(rows), self.group_size, rows.grid.number, rows.levels
            )
            for rows in self._rows()
        ]  # fmt: skip
        return self._joined([codes for codes, _ in found]), self._joined([scale for _, scale in found])

    def by_kinds(self, round_rows: Callable[..., Tensor], weight: Tensor, scale: Tensor) -> Tensor:
        """Codes (out, in) from a function of (weight, scale, bits, number, levels) of rows of one kind."""
        return self._whole(
            lambda rows: round_rows(
                rows.of(weight), rows.of(scale), rows.grid.bits, rows.grid.number, rows.levels
            )
        )

    def clipped(self, weight: Tensor) -> Tensor:
        """The weight (out, in), clamped to its learned range."""
        return clip_weight(weight, self.clip, self.group_size)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The weight (out, in), float32, that codes (out, in) and scales (out, groups) stand for.

        Raises AttarError for codes outside a kind's range.
        """

        def number(rows: _Rows) -> Tensor:
            own, (low, high) = rows.of(codes), code_range(rows.grid.bits)
            if bool((own < low).any()) or bool((own > high).any()):
                raise AttarError(f"codes do not fit {rows.grid.bits} bits of {tuple(own.shape)}")
            grouped = own.unflatten(1, (scale.shape[1], -1))
            numbers = decode(grouped, rows.grid.number, rows.grid.bits, rows.levels)
            return (numbers * rows.of(scale).unsqueeze(-1)).flatten(1)

        return self._whole(number)

    def stored(self) -> dict[str, Any]:
        """What `PackedLinear.from_codes` has to know beside codes and scales."""
        rows = self._rows()
        if not self.mixed:
            grid = rows[0].grid
            return {"bits": grid.bits, "weight_format": grid.stored, "levels": rows[0].levels}
        count = sum(len(own.places) for own in rows)  # type: ignore[arg-type]
        kinds = [RowKind(own.grid.bits, own.grid.stored, len(own.places)) for own in rows]  # type: ignore[arg-type]
        row_kind = torch.zeros(count, dtype=torch.uint8, device=rows[0].places.device)  # type: ignore[union-attr]
        for i, own in enumerate(rows):
            row_kind[own.places] = i
        levels = [own.levels.flatten() for own in rows if own.levels is not None]
        return {
            "bits": max(kind.bits for kind in kinds),
            "levels": torch.cat(levels) if levels else None,
            "rows": kinds,
            "row_kind": row_kind,
        }

    def _rows(self) -> list[_Rows]:
        return list(self.kinds)  # type: ignore[arg-type]

    def _clip(self, rows: _Rows) -> Tensor | None:
        return None if self.clip is None else rows.of(self.clip, 1)

    def _whole(self, make: Callable[[_Rows], Tensor]) -> Tensor:
        return self._joined([make(rows) for rows in self._rows()])

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Parts of the kinds, (rows, …) each, with all rows in their places."""
        return parts[0] if self.order is None else torch.cat(parts).index_select(0, self.order)


def check_row_grid(grid: Grid) -> None:
    """Raises AttarError where rows of one weight cannot have this grid beside others."""
    check_weight_format(grid.weight_format, grid.bits)
    if grid.number not in INTEGER_FORMATS and not has_own_tables(grid.weight_format):
        raise AttarError(
            f"rows of several kinds cannot be {grid.weight_format}",
            fix="Use int or full_range, or a format whose rows have tables of their own",
        )
