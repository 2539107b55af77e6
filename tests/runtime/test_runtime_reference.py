"""Invariants of the symmetric quantizer and exactness of the integer linear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import AttarError
from attar.runtime.formats import integer_range
from attar.runtime.reference import (
    dequantize,
    integer_linear,
    integer_matmul,
    quantize,
    quantize_tokens,
    symmetric_scale,
)

seeds = st.integers(0, 2**31 - 1)


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seeds, st.integers(2, 8), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=40)
def test_codes_stay_in_range_and_errors_below_half_a_step(seed, bits, size):
    x = tokens(seed, 5, 33) * size
    codes, scale = quantize_tokens(x, bits)
    low, high = integer_range(bits)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    assert low <= codes.min() and codes.max() <= high
    restored = dequantize(codes, scale)
    assert ((x - restored).abs() <= scale / 2 * (1 + 1e-5)).all()
    assert torch.equal(quantize(restored, scale, bits), codes)  # idempotent
    assert restored.unique().numel() <= 5 * 2**bits


def test_error_does_not_grow_with_bits_and_16_bits_are_nearly_lossless():
    x, w = tokens(0, 64, 128), tokens(1, 32, 128)
    reference = x.double() @ w.double().T
    errors = {}
    for bits in (3, 4, 6, 8, 16):
        codes_x, scale_x = quantize_tokens(x, bits)
        scale_w = symmetric_scale(w.abs().amax(1, keepdim=True), bits)
        y = integer_linear(
            codes_x, scale_x, quantize(w, scale_w, bits), scale_w, None, torch.float64, bits, bits
        )
        errors[bits] = float((y - reference).norm() / reference.norm())
    values = list(errors.values())
    assert values == sorted(values, reverse=True)
    assert errors[16] < 1e-3


@given(seeds, st.integers(2, 8))
@settings(deadline=None, max_examples=25)
def test_scale_is_per_token(seed, bits):
    x = tokens(seed, 2, 6, 16)
    restored = dequantize(*quantize_tokens(x, bits))
    scaled = x.clone()
    scaled[1, 3] *= 4  # a power of two: exact
    again = dequantize(*quantize_tokens(scaled, bits))
    assert torch.equal(again[1, 3], 4 * restored[1, 3])
    scaled[1, 3] = restored[1, 3] = again[1, 3] = 0
    assert torch.equal(again, restored)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    codes, scale = quantize_tokens(x, bits)
    codes_permuted, scale_permuted = quantize_tokens(x[:, order], bits)
    assert torch.equal(codes[:, order], codes_permuted) and torch.equal(scale[:, order], scale_permuted)


def test_multiplying_a_token_by_seven_multiplies_its_row_by_seven():
    x = tokens(3, 8, 64)
    restored = dequantize(*quantize_tokens(x, 6))
    x[2] *= 7
    again = dequantize(*quantize_tokens(x, 6))
    torch.testing.assert_close(again[2], 7 * restored[2], rtol=1e-5, atol=1e-6)
    again[2] = restored[2]
    assert torch.equal(again, restored)


@pytest.mark.parametrize("value", [0.0, 1e-12, -3.0])
@pytest.mark.parametrize("clip", [None, (0.98, 0.9), (0.5, 1.0)])
def test_constant_tokens_are_finite(value, clip):
    codes, scale = quantize_tokens(torch.full((3, 8), value), 4, clip)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.isfinite(dequantize(codes, scale)).all()
    if value == 0:
        assert (codes == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", [None, (0.98, 0.98)])
def test_non_finite_tokens_become_nan_and_leave_others_alone(bad, clip):
    x, w = tokens(0, 4, 16), tokens(1, 8, 16)
    scale_w = symmetric_scale(w.abs().amax(1, keepdim=True), 4)
    codes_w = quantize(w, scale_w, 4)

    def run(x):
        return integer_linear(*quantize_tokens(x, 6, clip), codes_w, scale_w, None, torch.float32, 6, 4)

    clean = run(x)
    x[1, 5] = bad
    y = run(x)
    assert not torch.isfinite(y[1]).any()
    others = [0, 2, 3]
    assert torch.equal(y[others], clean[others])


def test_clip_factors_bound_the_range_of_each_token():
    x = tokens(0, 10, 64)
    codes, scale = quantize_tokens(x, 4, (0.5, 0.8))
    low, high = 0.5 * x.amin(-1, keepdim=True), 0.8 * x.amax(-1, keepdim=True)
    torch.testing.assert_close(scale, torch.maximum(low.abs(), high) / 7)
    clamped = torch.minimum(torch.maximum(x, low), high)
    assert torch.equal(codes, quantize(clamped, scale, 4))
    plain, plain_scale = quantize_tokens(x, 4)
    with_ones, ones_scale = quantize_tokens(x, 4, torch.ones(2))
    assert torch.equal(plain, with_ones) and torch.equal(plain_scale, ones_scale)


def test_rounding_is_half_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize(x, torch.ones(1, 1), 8).tolist() == [[0, 2, 2, 0, -2]]


@given(seeds, st.integers(2, 8), st.integers(2, 8), st.integers(1, 3000))
@settings(deadline=None, max_examples=30)
def test_accumulation_is_exact(seed, bits_x, bits_w, width):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(*_bounds(bits_x), (3, width), generator=generator, dtype=torch.int8)
    w = torch.randint(*_bounds(bits_w), (5, width), generator=generator, dtype=torch.int8)
    exact = x.long() @ w.long().T
    assert torch.equal(integer_matmul(x, w, bits_x, bits_w).long(), exact)


@pytest.mark.parametrize("bits_x, bits_w, width", [(8, 8, 1024), (8, 8, 1025), (8, 8, 20000), (6, 4, 65536)])
def test_accumulation_is_exact_at_the_extremes(bits_x, bits_w, width):
    x = torch.full((2, width), integer_range(bits_x)[0], dtype=torch.int8)
    w = torch.full((3, width), integer_range(bits_w)[0], dtype=torch.int8)
    w[1], x[1, 0] = integer_range(bits_w)[1], 1
    assert torch.equal(integer_matmul(x, w, bits_x, bits_w).long(), x.long() @ w.long().T)


def test_integer_linear_scales_and_adds_the_bias():
    x, w, bias = tokens(0, 2, 5, 24), tokens(1, 7, 24), tokens(2, 7)
    codes_x, scale_x = quantize_tokens(x, 6)
    scale_w = symmetric_scale(w.abs().amax(1, keepdim=True), 4)
    codes_w = quantize(w, scale_w, 4)
    expected = dequantize(codes_x, scale_x).double() @ dequantize(codes_w, scale_w).double().T + bias
    y = integer_linear(codes_x, scale_x, codes_w, scale_w, bias, torch.float32, 6, 4)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert integer_linear(codes_x, scale_x, codes_w, scale_w, bias, torch.bfloat16).dtype == torch.bfloat16


def test_scales_are_float32_for_bfloat16_activations():
    x = tokens(0, 4, 16).bfloat16()
    codes, scale = quantize_tokens(x, 8)
    assert scale.dtype == torch.float32
    assert torch.equal(codes, quantize_tokens(x.float(), 8)[0])


@pytest.mark.parametrize("bits", [0, 1, 17])
def test_impossible_bits(bits):
    with pytest.raises(AttarError, match="between 2 and 16"):
        integer_range(bits)


def _bounds(bits):
    low, high = integer_range(bits)
    return low, high + 1
