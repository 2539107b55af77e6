"""Weight formats that are tables: sorted numbers in [-1, 1], to which a row or group of weights is scaled.

    fp4     e2m1: ±{0, .5, 1, 1.5, 2, 3, 4, 6} / 6
    nf4     quantiles of the normal distribution (QLoRA, arXiv 2305.14314)
    power   sign(k)·|k / q|^(1/a), uniform after x -> sign(x)|x|^a; one exponent a for the layer (PowerQuant, NUPES)
    twin_log  a logarithmic grid for each sign of each row (LRQ-DiT), see twin_log.py; twin_log_released: with the
            offsets of the released code, in absolute units

A table is made once, from the weights that the layer starts with, and stays while scales and clipping are learned. Its
numbers are exact in half precision, in which they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attar.errors import AttarError
from attar.quantize.twin_log import twin_log_levels
from attar.runtime.formats import decode, encode

EXPONENTS = tuple(round(0.2 + 0.05 * i, 2) for i in range(27))  # 0.2 … 1.5


@dataclass(frozen=True)
class TableFormat:
    """bits: those that it has. fit: steps (out, groups, n) in [-1, 1] -> levels (1 or out, 1 or groups, 2^bits).

    by_row: each row and group has a table of its own. absolute: `fit` is given the weights, not divided by anything.
    """

    bits: tuple[int, ...]
    fit: Callable[[Tensor, int], Tensor]
    by_row: bool = False
    absolute: bool = False


def fit_levels(name: str, steps: Tensor, bits: int, largest: Tensor | None = None) -> Tensor:
    """The levels of the table format `name` for weights that were divided by their largest magnitude, float16.

    steps: (out, groups, n). largest: those magnitudes (out, groups, 1), by default 1. Raises AttarError for an unknown
    format, or bits that it does not have.
    """
    check_weight_format(name, bits)
    table = TABLES[name]
    numbers = steps * largest if table.absolute and largest is not None else steps
    return table.fit(numbers, bits).to(device=steps.device, dtype=torch.float16)


def table_bytes(name: str, bits: int, rows: int, groups: int) -> int:
    """What the levels of a layer with so many rows and groups weigh; 0 for formats that are not tables."""
    if name not in TABLES:
        return 0
    return (2 << bits) * (rows * groups if TABLES[name].by_row else 1)


def number_of(name: str) -> str:
    """The format of the runtime that stores a weight format: "int", "fp8" or "table"."""
    return "table" if name in TABLES else name


def check_weight_format(name: str, bits: int) -> None:
    """Raises AttarError for a weight format that does not exist, or not with so many bits."""
    if name not in WEIGHT_FORMATS:
        raise AttarError(f"unknown weight format {name!r}", fix=f"Choose one of {', '.join(WEIGHT_FORMATS)}")
    has = TABLES[name].bits if name in TABLES else (8,) if name == "fp8" else tuple(range(2, 17))
    if bits not in has:
        raise AttarError(
            f"the weight format {name} has no {bits} bits", fix=f"Use {' or '.join(map(str, has))} bits"
        )


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


def power_levels(exponent: float, bits: int) -> Tensor:
    """sign(k)·|k / q|^(1/a) for k = -q … q with q = 2^(bits-1) - 1, and -1 once more: (1, 1, 2^bits)."""
    most = (1 << (bits - 1)) - 1
    codes = torch.arange(-most, most + 1, dtype=torch.float64) / most
    table = codes.sign() * codes.abs() ** (1 / exponent)
    return torch.cat([table[:1], table]).float().view(1, 1, -1)


def _power(steps: Tensor, bits: int) -> Tensor:
    """The exponent with the smallest squared error over the whole layer."""

    def error(exponent: float) -> float:
        levels = power_levels(exponent, bits).to(torch.float16).to(steps.device)
        return (
            (steps - decode(encode(steps, "table", bits, levels), "table", bits, levels))
            .square()
            .sum()
            .item()
        )

    return power_levels(min(EXPONENTS, key=error), bits)


TABLES: dict[str, TableFormat] = {
    "fp4": TableFormat((4,), _fp4),
    "nf4": TableFormat((4,), _nf4),
    "power": TableFormat((2, 3, 4, 5, 6, 7, 8), _power),
    "twin_log": TableFormat((3, 4, 5, 6, 7, 8), twin_log_levels, by_row=True, absolute=True),
    "twin_log_released": TableFormat(
        (3, 4, 5, 6, 7, 8), partial(twin_log_levels, released=True), by_row=True, absolute=True
    ),
}
WEIGHT_FORMATS = ("int", "fp8", *TABLES)
