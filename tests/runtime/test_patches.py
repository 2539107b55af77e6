"""Convolutions as linears over patches, and layers split over concatenated inputs: the same functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attar.errors import AttarError
from attar.quantize.linear import QuantizedLinear
from attar.runtime.patches import (
    PatchLinear,
    SplitLinear,
    dense_biases,
    dense_place,
    open_layers,
    split_sizes,
)

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def numbers(*shape: int, seed: int, whole: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if whole:  # every sum of products is exact in float32
        return torch.randint(-8, 9, shape, generator=generator).float()
    return torch.randn(*shape, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    kernel=pairs, stride=pairs, dilation=pairs, padding=st.one_of(pairs, st.just("same"), st.just("valid")),
    channels=pairs, bias=st.booleans(), last=st.booleans(), whole=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_convolution(kernel, stride, dilation, padding, channels, bias, last, whole, seed):
    """Bit for bit where all sums are exact, up to the order of sums elsewhere."""
    if padding == "same":
        stride = (1, 1)
    conv = nn.Conv2d(
        *channels, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias
    ).requires_grad_(False)
    conv.weight.copy_(numbers(*conv.weight.shape, seed=seed, whole=whole))
    if bias:
        conv.bias.copy_(numbers(channels[1], seed=seed + 1, whole=whole))
    x = numbers(2, channels[0], 8, 11, seed=seed + 2, whole=whole)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    patch = PatchLinear(conv)
    expected, y = conv(x), patch(x)
    assert torch.equal(y, expected) if whole else torch.allclose(y, expected, atol=1e-5)
    assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(patch.weight, conv.weight) and patch.weight.shape == conv.weight.shape
    assert patch.linear.weight.data_ptr() == conv.weight.data_ptr()
    assert torch.equal(patch(x[0]), y[0]) or not whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moves_with_the_model(dtype):
    conv = nn.Conv2d(4, 6, 3, padding=1)
    patch = PatchLinear(conv).to(dtype)
    x = torch.randn(1, 4, 5, 7).to(dtype)
    y = patch(x)
    assert y.dtype == dtype and y.shape == (1, 6, 5, 7)
    torch.testing.assert_close(y, conv.to(dtype)(x), atol=2e-2 if dtype != torch.float64 else 1e-12, rtol=0)


def test_gradients_equal_the_convolutions():
    conv = nn.Conv2d(3, 5, 3, padding=1, stride=2).double()
    patch = PatchLinear(conv)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64).requires_grad_()
    grads = [torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (conv, patch)]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding_mode": "reflect", "padding": 1}])
def test_refuses_what_is_no_product_with_whole_patches(options):
    with pytest.raises(AttarError, match=r"groups|reflect"):
        PatchLinear(nn.Conv2d(4, 4, 3, **options))


def test_quantizes_each_pixel_over_its_patch():
    """A quantized convolution is the exact product of integers: the codes of the patch times those of the weight."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    patch = PatchLinear(conv)
    x = torch.randn(2, 4, 5, 6)
    rows = patch.patches(x).flatten(1, 2)
    patch.linear = QuantizedLinear(patch.linear, 4, 6, weight_clip=False, act_clip=False).bake()
    scale = rows.abs().amax(-1, keepdim=True) / 31
    fake = (rows / scale).round() * scale @ patch.linear.dequantized().T + conv.bias
    expected = fake.transpose(1, 2).unflatten(2, (5, 6))
    torch.testing.assert_close(patch(x), expected, atol=1e-5, rtol=0)
    assert patch.weight.shape == conv.weight.shape


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4), bias=st.booleans(), seed=st.integers(0, 99))
def test_a_split_layer_is_the_layer(sizes, bias, seed):
    linear = nn.Linear(sum(sizes), 5, bias=bias).requires_grad_(False)
    linear.weight.copy_(numbers(5, sum(sizes), seed=seed, whole=True))
    if bias:
        linear.bias.copy_(numbers(5, seed=seed + 1, whole=True))
    x = numbers(2, 3, sum(sizes), seed=seed + 2, whole=True)
    split = SplitLinear(linear, sizes)
    assert torch.equal(split(x), linear(x))
    assert torch.equal(split.weight, linear.weight) and (split.bias is None) == (not bias)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [10.0, 0.1])
def test_splitting_helps_where_ranges_differ(ratio, seed):
    """Half of the channels ten times larger: at 4 bits one scale for both, which loses the small ones, errs at least
    four times as much (the proof list of QuEST)."""
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(32, 16, 3, padding=1).requires_grad_(False)
    conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator))
    conv.weight[:, 16:] /= ratio  # the layer makes up for it, as a trained one does
    x = torch.randn(2, 32, 8, 8, generator=generator)
    x[:, 16:] *= ratio
    errors = {}
    for split in (False, True):
        model = nn.ModuleDict({"conv": conv})
        names = ["conv.linear.parts.0", "conv.linear.parts.1"] if split else ["conv.linear"]
        open_layers(model, names, {"conv.linear": [144, 144]} if split else {})
        for name in names:
            layer = QuantizedLinear(model.get_submodule(name), 4, 4, weight_clip=False, act_clip=False)
            model.set_submodule(name, layer)
        errors[split] = (model["conv"](x) - conv(x)).square().mean().item()
    assert errors[True] < 0.25 * errors[False]


def test_names_tell_the_form():
    dense = nn.ModuleDict({"conv": nn.Conv2d(6, 4, 1), "proj": nn.Linear(6, 4), "norm": nn.ModuleDict()})
    dense["norm"]["linear"] = nn.Linear(3, 3)  # a name that is no patch form
    widths = {"conv.linear.parts.0": 2, "conv.linear.parts.1": 4, "proj.parts.0": 3, "proj.parts.1": 3}
    names = [*widths, "norm.linear"]
    splits = split_sizes(widths)
    assert splits == {"conv.linear": [2, 4], "proj": [3, 3]}
    assert [dense_place(dense, n) for n in names] == ["conv", "conv", "proj", "proj", "norm.linear"]
    x = torch.randn(1, 6, 3, 3)
    before = dense["conv"](x), dense["proj"](x[0].flatten(1).T)
    for _ in range(2):
        open_layers(dense, names, splits)
    assert all(isinstance(dense.get_submodule(n), nn.Linear) for n in names)
    after = dense["conv"](x), dense["proj"](x[0].flatten(1).T)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert dense_biases(dense) == {"conv.linear.parts.0.bias": "conv.bias", "proj.parts.0.bias": "proj.bias"}
