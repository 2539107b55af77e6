import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import AttarError
from attar.quantize.formats import (
    clip_weight,
    fake_quantize,
    fake_quantize_tokens,
    fake_quantize_weight,
    group_count,
    quantize_weight,
)
from attar.runtime.formats import integer_range
from attar.runtime.reference import dequantize, quantize, quantize_tokens, symmetric_scale


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 9999), st.floats(1e-6, 1e6), st.floats(0.3, 1), st.floats(0.3, 1))
def test_fake_is_dequantize_of_quantize_bit_for_bit(bits, seed, size, low, high):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 24, generator=generator) * size
    x[0, 0], x[0, 1], x[1, 2] = 0, x[0, 1].abs(), -x[1, 2].abs()
    scale = symmetric_scale(x.abs().amax(-1, keepdim=True) * low, bits)
    assert torch.equal(fake_quantize(x, scale, bits), dequantize(quantize(x, scale, bits), scale))
    clip = torch.tensor([low, high])
    for c in (None, clip):
        for number in ("int", "full_range"):
            rebuilt = dequantize(*quantize_tokens(x, bits, c, number))
            assert torch.equal(fake_quantize_tokens(x, bits, c, number), rebuilt)
    weight = x[0]
    for group in (None, 8):
        factors = clip.reshape(2, 1, 1).expand(2, 5, group_count(24, group))
        codes, scales = quantize_weight(weight, bits, factors, group)
        assert codes.min() >= integer_range(bits)[0] and codes.max() <= integer_range(bits)[1]
        rebuilt = (codes.float().unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(1)
        assert torch.equal(fake_quantize_weight(weight, bits, factors, group), rebuilt)
        clamped = clip_weight(weight, factors, group)
        assert (clamped.abs() <= weight.abs()).all()


def test_factors_of_one_are_plain_symmetric_rounding():
    torch.manual_seed(0)
    x = torch.randn(6, 32)
    plain = fake_quantize(x, symmetric_scale(x.abs().amax(-1, keepdim=True), 4), 4)
    assert torch.equal(fake_quantize_tokens(x, 4, torch.ones(2)), plain)
    assert torch.equal(fake_quantize_tokens(x, 4), plain)
    assert torch.equal(fake_quantize_weight(x, 4), plain)


@pytest.mark.parametrize("bits, most", [(3, 0.9), (4, 0.85), (6, 0.97)])
def test_the_full_range_uses_every_code_and_errs_less(bits, most):
    torch.manual_seed(0)
    x = torch.randn(400, 64)
    codes, step = quantize_tokens(x, bits, None, "full_range")
    low, high = integer_range(bits)
    # the nearer end decides where it is nearly as far
    assert (codes.amin(-1) == low).float().mean() > (0.6 if bits > 3 else 0.1) and codes.amax() == high
    larger = x.amax(-1) > -x.amin(-1)
    assert torch.equal(step[:, 0] < 0, larger)
    error, plain = (
        (fake_quantize_tokens(x, bits, None, n) - x).square().mean() for n in ("full_range", "int")
    )
    assert error < most * plain


def test_error_falls_with_bits_and_a_group_of_the_whole_row_is_per_channel():
    torch.manual_seed(0)
    x = torch.randn(64, 48)
    errors = [(fake_quantize_tokens(x, bits) - x).square().mean() for bits in (2, 3, 4, 6, 8, 16)]
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-6
    assert torch.equal(fake_quantize_weight(x, 4, group_size=48), fake_quantize_weight(x, 4))
    grouped = (fake_quantize_weight(x, 4, group_size=8) - x).square().mean()
    assert grouped < (fake_quantize_weight(x, 4) - x).square().mean()
    with pytest.raises(AttarError, match="groups of 7"):
        fake_quantize_weight(x, 4, group_size=7)


def test_tokens_are_quantized_independently():
    torch.manual_seed(0)
    x = torch.randn(3, 7, 16)
    y = fake_quantize_tokens(x, 4, torch.tensor([0.9, 0.8]))
    scaled = x.clone()
    scaled[1, 2] *= 8  # a power of two, so that not even rounding differs
    z = fake_quantize_tokens(scaled, 4, torch.tensor([0.9, 0.8]))
    assert torch.equal(z[1, 2], 8 * y[1, 2])
    z[1, 2] = y[1, 2]
    assert torch.equal(z, y)
    seven = x[:1, :1] * 7
    assert torch.allclose(fake_quantize_tokens(seven, 4), 7 * fake_quantize_tokens(x[:1, :1], 4), rtol=1e-6)
    assert torch.equal(fake_quantize_tokens(x.flip(0), 4, torch.tensor([0.9, 0.8])), y.flip(0))


def straight_through(x, low_factor, high_factor, bits, number):
    """The same forward pass composed from autograd operations."""
    low, high = x.amin(-1, keepdim=True) * low_factor, x.amax(-1, keepdim=True) * high_factor
    if number == "int":
        scale = torch.maximum(low.abs(), high).clamp(min=1e-5) / (2 ** (bits - 1) - 1)
    else:
        q = 2 ** (bits - 1)
        positive = torch.maximum(-low / q, high / (q - 1)).clamp(min=1e-5 / q)
        negative = torch.maximum(high / q, -low / (q - 1)).clamp(min=1e-5 / q)
        scale = torch.where(high > -low, -negative, positive)
    steps = torch.minimum(torch.maximum(x, low), high) / scale
    return (steps + (steps.round() - steps).detach()) * scale


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10_000), st.booleans(), st.booleans())
def test_gradients_equal_those_of_the_composed_operations(bits, seed, per_row, full_range):
    number = "full_range" if full_range and not per_row else "int"
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 24, generator=generator, dtype=torch.float64)
    x[0], x[1] = x[0].abs() + 0.1, -x[1].abs() - 0.1
    x[2] *= 1e-7
    shape = (9, 1) if per_row else ()
    factors = [torch.rand(shape, generator=generator, dtype=torch.float64) * 0.5 + 0.45 for _ in range(2)]
    upstream = torch.randn(9, 24, generator=generator, dtype=torch.float64)
    results = []
    for function in ("fused", "composed"):
        leaves = [t.clone().requires_grad_() for t in (x, *factors)]
        if function == "composed":
            y = straight_through(*leaves, bits, number)
        elif per_row:
            y = fake_quantize_weight(leaves[0], bits, torch.stack(leaves[1:]))
        else:
            y = fake_quantize_tokens(leaves[0], bits, torch.stack(leaves[1:]), number)
        results.append((y.detach(), *torch.autograd.grad((y * upstream).sum(), leaves)))
    for fused, composed in zip(*results, strict=True):
        assert torch.allclose(fused, composed, rtol=1e-9, atol=1e-12)


def test_gradient_is_zero_outside_and_flows_into_the_step_size():
    x = torch.tensor([[0.3, -0.2, 5.0, 0.9]], requires_grad=True)
    scale = torch.tensor([[0.25]], requires_grad=True)
    fake_quantize(x, scale, 4).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 1.0, 0.0, 1.0]]))
    residuals = torch.tensor([0.3, -0.2, 0.9]).div(0.25).round() - torch.tensor([0.3, -0.2, 0.9]) / 0.25
    assert torch.allclose(scale.grad, residuals.sum() + 7)
    logits = torch.full((2,), 4.0, requires_grad=True)
    torch.manual_seed(0)
    fake_quantize_tokens(torch.randn(20, 64), 4, logits.sigmoid()).square().sum().backward()
    assert (logits.grad != 0).all()


def test_zero_rows_stay_zero_and_bfloat16_is_computed_in_float32():
    zero = torch.zeros(2, 8, requires_grad=True)
    y = fake_quantize_tokens(zero, 4, torch.tensor([0.9, 0.9]))
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8)) and torch.isfinite(zero.grad).all()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(fake_quantize_tokens(x, 6), fake_quantize_tokens(x.float(), 6))
