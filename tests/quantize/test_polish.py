"""Packed layers whose codes stay while scales, biases and clipping are trained."""

import pytest
import torch
from torch import nn

from attar.quantize.initialize import TransformSettings, build_transforms
from attar.quantize.linear import QuantizedLinear
from attar.quantize.low_rank import LowRankSettings, start_branch
from attar.quantize.polish import ScaledCodes


def packed(acts=4, bias=True, rotation="hadamard", group=None, clip=True, branch=False, **formats):
    torch.manual_seed(0)
    linear = nn.Linear(32, 24, bias=bias)
    settings = TransformSettings(scale=rotation != "none", rotation=rotation)
    generator = torch.Generator().manual_seed(0)
    transforms = build_transforms(linear, torch.rand(32) + 0.5, settings, generator)
    layer = QuantizedLinear(linear, 4, acts, transforms, group_size=group, act_clip=clip, **formats)
    if branch:
        start_branch(layer, LowRankSettings(rank=2))
    return layer.bake()


CASES = [
    {}, {"acts": None}, {"bias": False}, {"rotation": "kronecker"}, {"rotation": "none"}, {"clip": False},
    {"acts": None, "group": 8}, {"weight_format": "nf4"}, {"weight_format": "lloyd"}, {"branch": True},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_the_packed_layer_does(case):
    layer = packed(**case)
    x = torch.randn(3, 7, 32)
    scaled = ScaledCodes(layer)
    assert torch.allclose(scaled(x), layer(x), atol=2e-5)
    found = scaled.trained()
    assert torch.allclose(found["weight_scale"], layer.weight_scale, rtol=1e-6)
    assert ("bias" in found) == (layer.bias is not None) and ("act_clip" in found) == (
        layer.act_clip is not None
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_was_trained_is_what_the_packed_layer_then_computes(case):
    layer = packed(**case)
    scaled, x = ScaledCodes(layer), torch.randn(3, 7, 32)
    codes = layer.codes.clone()
    scaled(x).square().mean().backward()
    with torch.no_grad():
        for parameter in scaled.parameters(recurse=False):
            assert parameter.grad is not None and parameter.grad.any()
            parameter -= 1e-2 * parameter.grad.sign()
        expected = scaled(x)
        for name, tensor in scaled.trained().items():
            getattr(layer, name).data = tensor
        assert torch.allclose(layer(x), expected, atol=2e-5)
    assert torch.equal(layer.codes, codes)


def test_gradients_pass_to_the_input():
    scaled, x = ScaledCodes(packed()), torch.randn(2, 5, 32, requires_grad=True)
    scaled(x).sum().backward()
    assert x.grad is not None and x.grad.any()


def test_scales_stay_positive():
    scaled = ScaledCodes(packed())
    with torch.no_grad():
        scaled.log_scale -= 20
    assert bool((scaled.trained()["weight_scale"] > 0).all())
