"""Dense storage of integer codes: `bits` bits each, no padding but up to the last byte of a row.

A row is one little-endian bit stream: code i occupies bits [i·b, (i+1)·b), stored as the unsigned number
code + 2^(b-1). Every code of the range is valid, -2^(b-1) included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.errors import AttarError
from attar.runtime.formats import code_range


def packed_width(in_features: int, bits: int) -> int:
    """Bytes of one packed row."""
    _check_bits(bits)
    return -(-in_features * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes int8 (out, in) in the range of `bits` (1..8) -> uint8 (out, ceil(in·bits/8)).

    Raises AttarError when a code lies outside the range.
    """
    width = packed_width(codes.shape[-1], bits)
    low, high = code_range(bits)
    codes = codes.to(torch.int16)
    if codes.numel() and not bool(((codes >= low) & (codes <= high)).all()):
        raise AttarError(f"codes outside the {bits}-bit range [{low}, {high}]")
    unsigned = F.pad(codes - low, (0, -codes.shape[-1] % 8))  # (out, 8·G)
    if bits == 8:
        return unsigned[:, :width].to(torch.uint8)
    unsigned = unsigned.to(torch.int64).unflatten(-1, (-1, 8))  # eight codes make `bits` bytes
    word = _join(unsigned, bits)  # (out, G), at most 56 bits
    octets = torch.stack([(word >> (8 * j)) & 255 for j in range(bits)], dim=-1)
    return octets.flatten(-2)[:, :width].to(torch.uint8).contiguous()


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Inverse of `pack`: uint8 (out, ceil(in·bits/8)) -> int8 (out, in)."""
    if packed.shape[-1] != packed_width(in_features, bits):
        raise AttarError(
            f"a row of {in_features} {bits}-bit codes takes {packed_width(in_features, bits)} bytes, "
            f"found {packed.shape[-1]}"
        )
    low = code_range(bits)[0]
    if 8 % bits == 0:  # codes do not cross bytes: stay in uint8
        mask = (1 << bits) - 1
        unsigned = torch.stack([(packed >> (bits * i)) & mask for i in range(8 // bits)], dim=-1)
        # uint8 wraps around, and read as int8 the wrapped number is the signed code
        return (unsigned.flatten(-2)[:, :in_features] + (low & 255)).view(torch.int8)
    octets = F.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int64)
    word = _join(octets, 8)  # (out, G)
    mask = (1 << bits) - 1
    codes = torch.stack([(((word >> (bits * i)) & mask) + low).to(torch.int8) for i in range(8)], dim=-1)
    return codes.flatten(-2)[:, :in_features]


def _join(digits: Tensor, width: int) -> Tensor:
    """int64 (..., n) of `width`-bit numbers -> (...), the first one in the lowest bits."""
    word = digits[..., 0]
    for i in range(1, digits.shape[-1]):
        word = word | (digits[..., i] << (width * i))
    return word


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise AttarError(f"cannot pack {bits}-bit codes", fix="Choose between 1 and 8 bits")
