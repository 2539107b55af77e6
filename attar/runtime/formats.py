"""Number formats: the values that a code stands for, before it is multiplied by a scale.

    int         code itself, two's complement of `bits` bits
    full_range  the same, scaled so that the smallest code is used as well (reference.py); for activations
    fp8         the float8 number e4m3fn (8 bits; largest value 448) whose bit pattern is code XOR 0x80
    table       levels[code + 2^(bits-1)]: the entry of a sorted table of 2^bits numbers in [-1, 1]

Codes are signed integers of `bits` bits in every format, so that they are packed alike. `encode` rounds to the nearest
number that the format has (integers and fp8: half to even), `decode` gives it back, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attar.errors import AttarError

INTEGER_FORMATS = ("int", "full_range")
FORMATS = (*INTEGER_FORMATS, "fp8", "table")
FP8_LARGEST = 448.0


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of `bits`-bit two's complement: (-2^(N-1), 2^(N-1) - 1). One bit has -1 and 0."""
    if not 1 <= bits <= 16:
        raise AttarError(f"there are no codes of {bits} bits", fix="Choose between 1 and 16 bits")
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def integer_range(bits: int) -> tuple[int, int]:
    """`code_range` of codes that are integers themselves, which takes two bits: one has no positive number."""
    if not 2 <= bits <= 16:
        raise AttarError(f"cannot quantize to {bits} bits", fix="Choose between 2 and 16 bits")
    return code_range(bits)


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged when it is float64."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def check_format(name: str, bits: int) -> None:
    """Raises AttarError for an unknown format, or bits that it does not have."""
    if name not in FORMATS:
        raise AttarError(f"unknown number format {name!r}", fix=f"Choose one of {', '.join(FORMATS)}")
    if name in INTEGER_FORMATS:
        integer_range(bits)
    if name == "fp8" and bits != 8:
        raise AttarError(f"fp8 has 8 bits, not {bits}")
    if name == "table" and not 1 <= bits <= 8:
        raise AttarError(f"a table has 1 to 8 bits, not {bits}")


def largest(name: str, bits: int) -> float:
    """The largest number of the format, which the largest magnitude of a row is scaled to (but for full_range)."""
    check_format(name, bits)
    return integer_range(bits)[1] if name in INTEGER_FORMATS else {"fp8": FP8_LARGEST, "table": 1.0}[name]


def encode(steps: Tensor, name: str, bits: int, levels: Tensor | None = None) -> Tensor:
    """Codes of the numbers nearest to `steps`, a tensor that was divided by its scale: int8, int16 above 8 bits.

    levels: of a table, sorted, (..., 2^bits); its leading axes broadcast against those of steps (..., n).
    Numbers outside the format's range get its smallest or largest code.
    """
    check_format(name, bits)
    steps = wide(steps)
    if name in INTEGER_FORMATS:
        low, high = integer_range(bits)
        return steps.round().clamp(low, high).to(torch.int8 if bits <= 8 else torch.int16)
    if name == "fp8":
        pattern = steps.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float32).to(torch.float8_e4m3fn)
        return (pattern.view(torch.uint8) ^ 0x80).view(torch.int8)
    table = _levels(levels, bits, steps.dtype)
    middles = (table[..., 1:] + table[..., :-1]) / 2
    # one table for all is searched without being repeated for every row
    middles = middles.flatten() if table.numel() == table.shape[-1] else middles.expand(*steps.shape[:-1], -1)
    places = torch.searchsorted(middles.contiguous(), steps.contiguous())
    return (places - (1 << (bits - 1))).to(torch.int8)


def decode(codes: Tensor, name: str, bits: int, levels: Tensor | None = None) -> Tensor:
    """The numbers that codes (..., n) stand for, float32. levels: as for `encode`."""
    check_format(name, bits)
    if name in INTEGER_FORMATS:
        return codes.to(torch.float32)
    if name == "fp8":
        return (codes.view(torch.uint8) ^ 0x80).view(torch.float8_e4m3fn).to(torch.float32)
    table = _levels(levels, bits, torch.float32)
    places = codes.to(torch.int64) + (1 << (bits - 1))
    if table.numel() == table.shape[-1]:
        return table.flatten()[places]
    return table.expand(*codes.shape[:-1], -1).gather(-1, places)


def check_levels(levels: Tensor, bits: int) -> None:
    """Raises AttarError unless `levels` (..., 2^bits) are sorted numbers in [-1, 1]."""
    if levels.shape[-1] != 1 << bits:
        raise AttarError(f"a table of {levels.shape[-1]} levels is not one of {bits} bits")
    fits = torch.isfinite(levels).all() & (levels.abs() <= 1).all() & (levels.diff(dim=-1) >= 0).all()
    if not bool(fits):
        raise AttarError("the levels of a table must be sorted numbers between -1 and 1")


def _levels(levels: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    if levels is None or levels.shape[-1] != 1 << bits:
        found = "none" if levels is None else levels.shape[-1]
        raise AttarError(f"a table of {bits} bits needs {1 << bits} levels, found {found}")
    return levels.to(dtype)
