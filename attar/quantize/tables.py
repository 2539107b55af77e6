"""Weight formats that are tables: sorted numbers in [-1, 1], to which a row or group of weights is scaled.

    fp4     e2m1: ±{0, .5, 1, 1.5, 2, 3, 4, 6} / 6
    nf4     quantiles of the normal distribution (QLoRA, arXiv 2305.14314)
    power   sign(k)·|k / q|^(1/a), uniform after x -> sign(x)|x|^a; one exponent a for the layer (PowerQuant, NUPES)
    twin_log  a logarithmic grid for each sign of each row (LRQ-DiT), see twin_log.py; twin_log_released: with the
            offsets of the released code, in absolute units

and those of row_tables.py, which each row, or each group of weights, has to itself. A table is made once, from the
weights that the layer starts with, and stays while scales and clipping are learned, unless its parameters are trained
too. Its numbers are exact in half precision, in which they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attar.errors import AttarError
from attar.quantize.row_tables import (
    as_table,
    binary_levels,
    binary_start,
    dual_levels,
    dual_plain,
    dual_start,
    lloyd_levels,
    lloyd_start,
    residual_levels,
    residual_start,
)
from attar.quantize.sorted_rows import SortedRows
from attar.quantize.twin_log import twin_log_levels
from attar.runtime.formats import INTEGER_FORMATS

EXPONENTS = tuple(round(0.2 + 0.05 * i, 2) for i in range(27))  # 0.2 … 1.5
ROWS_AT_ONCE = 1 << 24  # numbers that are sorted and summed in float64 together


@dataclass(frozen=True)
class TableFormat:
    """bits: those that it has. fit: steps (out, groups, n) in [-1, 1] -> levels (1 or out, 1 or groups, 2^bits).

    levels: None for a table that stays as it was fitted; else `fit` gives parameters (1 or out, 1 or groups, p), and
    this the levels for them, differentiably. per_row: whether each row, or each group, has a table of its own.
    absolute: `fit` is given the weights, not divided by anything.
    """

    bits: tuple[int, ...]
    fit: Callable[[Tensor, int], Tensor]
    levels: Callable[[Tensor, int], Tensor] | None = None
    per_row: bool = False
    absolute: bool = False


def fit_levels(name: str, steps: Tensor, bits: int, largest: Tensor | None = None) -> Tensor:
    """The levels of the table format `name` for weights that were divided by their largest magnitude, float16.

    steps: (out, groups, n). largest: those magnitudes (out, groups, 1), by default 1. Raises AttarError for an unknown
    format, or bits that it does not have.
    """
    return levels_for(name, fit_parameters(name, steps, bits, largest), bits).to(torch.float16)


def fit_parameters(name: str, steps: Tensor, bits: int, largest: Tensor | None = None) -> Tensor:
    """What the levels of a table format depend on, float32: the levels themselves where there is nothing to train."""
    check_weight_format(name, bits)
    table = TABLES[name]
    numbers = steps * largest if table.absolute and largest is not None else steps
    return table.fit(numbers, bits).to(device=steps.device, dtype=torch.float32)


def levels_for(name: str, parameters: Tensor, bits: int) -> Tensor:
    """Sorted levels in [-1, 1] for parameters, float32 but exact in half precision; differentiable."""
    build = TABLES[name].levels
    return _InHalf.apply(as_table(parameters if build is None else build(parameters, bits)))


class _InHalf(torch.autograd.Function):
    """Rounds to half precision; the gradient passes, in full precision, as if it did not."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor) -> Tensor:
        return levels.half().to(levels.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def number_of(name: str) -> str:
    """The number format of a weight format: "int", "full_range", "fp8" or "table"."""
    return "table" if name in TABLES else name


def least_bits(name: str) -> int:
    """1 for a weight format that has it, else 2, as integers and formats that do not exist."""
    return 1 if name in TABLES and 1 in TABLES[name].bits else 2


def _bits_of(name: str) -> tuple[int, ...]:
    if name in TABLES:
        return TABLES[name].bits
    return (8,) if name == "fp8" else tuple(range(2, 17))


def has_bits(name: str, bits: int) -> bool:
    """Whether a weight format exists with so many bits."""
    return name in WEIGHT_FORMATS and bits in _bits_of(name)


def check_weight_format(name: str, bits: int) -> None:
    """Raises AttarError for a weight format that does not exist, or not with so many bits."""
    if name not in WEIGHT_FORMATS:
        raise AttarError(f"unknown weight format {name!r}", fix=f"Choose one of {', '.join(WEIGHT_FORMATS)}")
    has = _bits_of(name)
    if bits not in has:
        some = (
            f"Choose between {min(has)} and {min(max(has), 8)} bits"
            if len(has) > 1
            else f"Use {min(has)} bits"
        )
        raise AttarError(f"the weight format {name} has no {bits} bits", fix=some)


def check_trained_levels(name: str) -> None:
    """Raises AttarError for a weight format without levels that could be trained."""
    if name not in TABLES or TABLES[name].levels is None:
        those = ", ".join(n for n, table in TABLES.items() if table.levels is not None)
        raise AttarError(f"the weight format {name} has no levels to train", fix=f"Choose one of {those}")


def has_own_tables(name: str) -> bool:
    """Whether each row of a weight format has a table to itself."""
    return name in TABLES and TABLES[name].per_row


def own_tables(name: str, out_features: int, groups: int) -> int:
    """How many tables a layer has."""
    return 0 if name not in TABLES else out_features * groups if has_own_tables(name) else 1


def _fp4(steps: Tensor, bits: int) -> Tensor:
    half = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]) / 6
    return torch.cat([-half.flip(0), half]).view(1, 1, -1)  # 0 twice, as in the format itself


def _nf4(steps: Tensor, bits: int) -> Tensor:
    """Eight quantiles for each sign, which share zero: 7 below it, zero, 8 above."""
    edge = 1 - 0.5 * (1 / 32 + 1 / 30)  # the mean of half a bin of 16 and of 15 bins
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(0.5, edge, 9)[1:])
    below = -normal.icdf(torch.linspace(0.5, edge, 8)[1:])
    table = torch.cat([below.flip(0), torch.zeros(1), above])
    return (table / table.abs().max()).view(1, 1, -1)


def power_levels(exponent: float | Tensor, bits: int) -> Tensor:
    """sign(k)·|k / q|^(1/a) for k = -q … q with q = 2^(bits-1) - 1, and -1 once more: (1, 1, 2^bits).

    exponent: kept within those that are searched, so that training cannot leave them.
    """
    exponent = torch.as_tensor(exponent)
    most = (1 << (bits - 1)) - 1
    codes = torch.arange(-most, most + 1, dtype=torch.float64, device=exponent.device) / most
    logs = codes.abs().clamp(min=1e-30).log()  # the power in log space has a gradient at 0 too, and it is 0
    power = (logs / exponent.double().clamp(EXPONENTS[0], EXPONENTS[-1])).exp()
    table = torch.where(codes == 0, 0, codes.sign() * power.flatten())
    return torch.cat([table[:1], table]).float().view(1, 1, -1)


def _power(steps: Tensor, bits: int) -> Tensor:
    """The exponent with the smallest squared error over the whole layer."""
    errors = sum(_power_errors(rows, bits)[0].sum(1) for rows in _portions(steps))
    return torch.tensor(EXPONENTS[int(torch.as_tensor(errors).argmin())]).view(1, 1, 1)


def _power_errors(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(squared errors (e, R) of rows (R, n), tables (e, 2^bits)) of all exponents that are searched."""
    tables = torch.cat([power_levels(exponent, bits)[0] for exponent in EXPONENTS]).half().to(rows.device)
    sorted_rows = SortedRows(rows)
    return torch.stack([sorted_rows.error(t.double().expand(len(rows), -1)) for t in tables]), tables


def _portions(steps: Tensor) -> tuple[Tensor, ...]:
    """The rows or groups (R, n) of steps (out, groups, n), a few at a time."""
    return steps.flatten(0, 1).split(max(1, ROWS_AT_ONCE // steps.shape[-1]))


def _for_rows(start: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """Parameters of every row or group, from a start that takes rows (R, n)."""

    def fit(steps: Tensor, bits: int) -> Tensor:
        return torch.cat([start(rows, bits) for rows in _portions(steps)]).unflatten(0, steps.shape[:2])

    return fit


def _lloyd(rows: Tensor, bits: int) -> Tensor:
    """Free levels, from the quantiles of the rows and from every other table of so many bits.

    Where twin_log is among them, whose search is over all rows, rows depend on each other a little.
    """
    others = [name for name, t in TABLES.items() if bits in t.bits and name not in ("lloyd", "power")]
    starts = [fit_levels(name, rows[:, None], bits).flatten(0, 1) for name in others]
    if bits in TABLES["power"].bits:  # with each row's own exponent, so that rows do not depend on each other
        errors, tables = _power_errors(rows, bits)
        starts.append(tables[errors.argmin(0)])
    return lloyd_start(rows, bits, starts)


TABLES: dict[str, TableFormat] = {
    "fp4": TableFormat((4,), _fp4),
    "nf4": TableFormat((4,), _nf4),
    "power": TableFormat((2, 3, 4, 5, 6, 7, 8), _power, power_levels),
    "twin_log": TableFormat((3, 4, 5, 6, 7, 8), twin_log_levels, per_row=True, absolute=True),
    "twin_log_released": TableFormat(
        (3, 4, 5, 6, 7, 8), partial(twin_log_levels, released=True), per_row=True, absolute=True
    ),
    "binary": TableFormat((1,), _for_rows(binary_start), binary_levels, per_row=True),
    "dual_binary": TableFormat((2,), _for_rows(dual_start), dual_levels, per_row=True),
    "dual_binary_plain": TableFormat((2,), _for_rows(dual_plain), dual_levels, per_row=True),
    "residual": TableFormat((3, 4, 5), _for_rows(residual_start), residual_levels, per_row=True),
    "lloyd": TableFormat((1, 2, 3, 4, 5), _for_rows(_lloyd), lloyd_levels, per_row=True),
}
WEIGHT_FORMATS = (*INTEGER_FORMATS, "fp8", *TABLES)
