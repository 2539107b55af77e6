"""Rows of numbers, sorted once, so that what a table of levels does to them is known without touching them again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class SortedRows:
    """Sums over the intervals of sorted rows, from prefix sums in float64.

    rows: (R, n). Whatever is nearest to one of k sorted levels is an interval of the sorted row, so assignment, cell
    means and squared error of a table take k binary searches for each row instead of a pass over its n numbers.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.sort(dim=-1).values.double().contiguous()
        self._sums = F.pad(self.rows.cumsum(-1), (1, 0))  # (R, n + 1)
        self._squares = F.pad(self.rows.square().cumsum(-1), (1, 0))

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """(smallest, largest) of each row, (R, 1)."""
        return self.rows[:, :1], self.rows[:, -1:]

    def intervals(self, borders: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(count, sum, sum of squares), each (R, k + 1), of what k sorted borders (R, k) divide the rows into.

        What lies on a border belongs below it, as in `attar.runtime.formats.encode`.
        """
        places = torch.searchsorted(self.rows, borders.double().contiguous(), right=True)
        places = F.pad(F.pad(places, (1, 0)), (0, 1), value=self.rows.shape[1])
        return (
            places.diff(dim=-1).double(),
            self._sums.gather(-1, places).diff(dim=-1),
            self._squares.gather(-1, places).diff(dim=-1),
        )

    def cells(self, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`intervals` of what is nearest to each of k sorted levels (R, k)."""
        return self.intervals((levels[:, 1:] + levels[:, :-1]) / 2)

    def error(self, levels: Tensor) -> Tensor:
        """Squared error (R,) of the rows rounded to the nearest of k sorted levels (R, k)."""
        count, total, squares = self.cells(levels)
        return (squares - 2 * levels * total + levels.square() * count).sum(-1)

    def quantiles(self, count: int) -> Tensor:
        """The middles of `count` equal shares of each row, (R, count)."""
        n = self.rows.shape[1]
        shares = (torch.arange(count, device=self.rows.device).double() + 0.5) / count
        return self.rows[:, (shares * n).long().clamp(max=n - 1)]
