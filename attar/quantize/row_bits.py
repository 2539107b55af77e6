"""Bits for each row of a weight, at an unchanged mean: one more for some rows, one less for as many others.

MPQ-DM (arXiv 2412.11549) gives the rows of the heaviest tails one bit more and those of the lightest one less, and
searches how many of each (its outlier-driven mixed quantization). MPQ-DMv2 (arXiv 2507.04290) makes the additional bit
a residual plane. Ours, `by: error`, takes the rows by what a bit changes in the output, which is exact and needs no
search: the errors of rows add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attar import ranks
from attar.errors import AttarError
from attar.quantize.linear import QuantizedLinear
from attar.quantize.weights import Grid, check_row_grid
from attar.runtime.formats import INTEGER_FORMATS

LOW, SAME, HIGH = range(3)  # one bit less, as many, one more
RULES = ("kurtosis", "error", "random")


@dataclass(frozen=True)
class RowBitsSettings:
    """Which rows get one bit more or less.

    by: "kurtosis", "error", or "random", a control. metric: of the errors that are compared, "weight", or "output" of
    the layer on the calibration inputs as they come. step, most: of kurtosis and random, k · step of all rows go each
    way for k = 0, 1, 2, … while it is at most `most`, and the k with the smallest error is taken; the released code of
    MPQ-DM has most = step = 0.1, its paper most = 0.5. salient_format: weight format of the rows with one bit more.
    """

    by: str = "kurtosis"
    metric: str = "output"
    step: float = 0.1
    most: float = 0.5
    salient_format: str = "int"

    def grids(self, bits: int, weight_format: str) -> list[Grid]:
        """Of LOW, SAME and HIGH rows. One-bit rows of integers are two levels around their mean ("binary").

        Raises AttarError where a format has no such bits, or rows of one weight cannot have it.
        """
        low = "binary" if bits == 2 and weight_format in INTEGER_FORMATS else weight_format
        high = weight_format if self.salient_format == "int" else self.salient_format
        found = [Grid(bits - 1, low), Grid(bits, weight_format), Grid(bits + 1, high)]
        for grid in found:
            if grid.bits > 8:
                raise AttarError(
                    f"rows around {bits} bits would have {grid.bits}",
                    fix="Choose at most 7 bits for the weights",
                )
            try:
                check_row_grid(grid)
            except AttarError as error:
                raise AttarError(
                    f"rows around {bits} bits would have {grid.bits}, and {error.what}",
                    fix="Choose other bits for the weights, or another format"
                    if grid.bits != bits
                    else error.fix,
                ) from error
        return found


@torch.no_grad()
def mix_rows(
    layer: QuantizedLinear,
    settings: RowBitsSettings,
    moment: Tensor | None = None,
    generator: torch.Generator | None = None,
    search_clip: bool = False,
) -> Tensor:
    """Gives the layer its row bits; returns which row got what, (out,) of LOW, SAME, HIGH.

    moment: (in, in), the mean of x̃ᵀx̃ over the layer's transformed inputs, for the metric "output". generator: of the
    random control. Errors are those of rounding to nearest with the clipping as it is now, or searched for each grid.
    Raises AttarError when there is no moment, and as `RowBitsSettings.grids`.
    """
    if settings.metric == "output" and moment is None:
        raise AttarError("row bits by the error of the output need calibration inputs", where="quantize.rows")
    grid = layer.quantizer.grid
    grids = settings.grids(grid.bits, grid.weight_format)
    weight = layer.transformed_weight()
    errors = []
    for i in range(len(grids)):
        layer.mix_rows(grids, torch.full((layer.out_features,), i, device=weight.device))
        if search_clip:
            layer.search_clip()
        errors.append(row_errors(layer.rounded(weight) - weight, moment))
    table = torch.stack(errors)
    if settings.by == "error":
        chosen = best_rows(table)
    else:
        if settings.by == "kurtosis":
            salience = kurtosis(weight)
        else:
            salience = torch.rand(layer.out_features, generator=generator).to(weight.device)
        chosen = searched_rows(table, salience, settings.step, settings.most)
    ranks.same_([chosen])
    layer.mix_rows(grids, chosen)
    return chosen


def kurtosis(rows: Tensor) -> Tensor:
    """mean (w - w̄)⁴ / s⁴ of every row (out, n), float64; s is the unbiased standard deviation, as in MPQ-DM's code.

    About 3 for normal numbers, 1.8 for uniform ones. A row of equal numbers has 0.
    """
    rows = rows.double()
    centred = rows - rows.mean(1, keepdim=True)
    spread = centred.square().sum(1) / max(1, rows.shape[1] - 1)
    return centred.pow(4).mean(1) / spread.square().clamp(min=torch.finfo(torch.float64).tiny)


def row_errors(difference: Tensor, moment: Tensor | None = None) -> Tensor:
    """δ C δᵀ of every row δ (out, in), float64: what it does to the output. Without a moment C (in, in), ‖δ‖²."""
    wide = difference.double()
    return (wide * (wide if moment is None else wide @ moment.double())).sum(1)


def searched_rows(errors: Tensor, salience: Tensor, step: float, most: float) -> Tensor:
    """k rows of the largest salience get HIGH and k of the smallest LOW, for the k of the smallest error; (out,).

    errors: (3, out), of each row with each grid. k = 0, which changes nothing, is always among those tried.
    """
    count = salience.numel()
    size = int(count * step)
    chosen = torch.full((count,), SAME, dtype=torch.long, device=salience.device)
    if size < 1:
        return chosen
    falling = salience.argsort(descending=True, stable=True)
    better = (errors[HIGH] - errors[SAME])[falling].cumsum(0)  # of the first k rows
    worse = (errors[LOW] - errors[SAME])[falling].flip(0).cumsum(0)
    tried = torch.arange(size, int(count * most) + 1, size, device=salience.device)
    tried = tried[2 * tried <= count]
    if not len(tried):
        return chosen
    change = better[tried - 1] + worse[tried - 1]
    if change.min() < 0:
        k = int(tried[change.argmin()])
        chosen[falling[:k]], chosen[falling[-k:]] = HIGH, LOW
    return chosen


def best_rows(errors: Tensor) -> Tensor:
    """The rows' grids with the smallest sum of errors (3, out) of all that keep the mean bits; (out,).

    From LOW, every row has two steps to take, of one bit each, and as many are taken as there are rows: those that gain
    most. A row whose second step gains more than its first takes both or none of them in the order of their mean, so
    there the result may be off the optimum by one row.
    """
    count = errors.shape[1]
    first, second = errors[LOW] - errors[SAME], errors[SAME] - errors[HIGH]
    swapped = second > first
    mean = (first + second) / 2
    first, second = torch.where(swapped, mean, first), torch.where(swapped, mean, second)
    # of equal gains first steps come first, so no row takes its second step alone
    order = torch.cat([first, second]).argsort(descending=True, stable=True)[:count]
    return torch.bincount(order % count, minlength=count)
