"""Packing is a bijection for every bit width, ragged rows included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import AttarError
from attar.runtime.formats import code_range
from attar.runtime.packing import pack, packed_width, unpack


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=80)
def test_round_trip(bits, rows, width, seed):
    low, high = code_range(bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high + 1, (rows, width), generator=generator, dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = low, high
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (rows, packed_width(width, bits)) == (rows, -(-width * bits // 8))
    restored = unpack(packed, bits, width)
    assert restored.dtype == torch.int8 and torch.equal(restored, codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_layout_is_a_little_endian_bit_stream(bits):
    low = code_range(bits)[0]
    codes = torch.tensor([[low + 1, low, low + 2, low + 3, low]], dtype=torch.int8)
    stream = sum(unsigned << (bits * i) for i, unsigned in enumerate([1, 0, 2, 3, 0]))
    expected = stream.to_bytes(packed_width(5, bits), "little")
    assert bytes(pack(codes, bits)[0].tolist()) == expected


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("side", [0, 1])
def test_code_out_of_range(bits, side):
    bound = code_range(bits)[side]
    codes = torch.tensor([[0, bound + (1 if side else -1)]], dtype=torch.int8)
    with pytest.raises(AttarError, match=f"outside the {bits}-bit range"):
        pack(codes, bits)


def test_wrong_width_and_bits():
    with pytest.raises(AttarError, match="takes 5 bytes, found 4"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 4, 10)
    for bits in (0, 9):
        with pytest.raises(AttarError, match=f"{bits}-bit"):
            pack(torch.zeros(2, 4, dtype=torch.int8), bits)
