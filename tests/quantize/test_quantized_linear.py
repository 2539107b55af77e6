import pytest
import torch
from torch import nn

from attar.errors import AttarError
from attar.quantize.finetune import _round_base
from attar.quantize.linear import (
    QuantizedLinear,
    parameter_groups,
    quantized_linears,
    replace_module,
    set_quantizers,
)
from attar.quantize.transforms import FixedHadamard, LearnedKronecker, LearnedOrthogonal, LearnedScale
from attar.runtime.layers import PackedLinear

D, OUT = 48, 20


def make_linear(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(D, OUT, bias=bias).to(dtype)


def make_transforms(*names):
    scale = torch.rand(D, generator=torch.Generator().manual_seed(1)) + 0.1
    kinds = {
        "scale": lambda: LearnedScale(scale),
        "hadamard": lambda: FixedHadamard(D),
        "kronecker": lambda: LearnedKronecker(D),
        "affine": lambda: LearnedKronecker(D, affine=True),
        "orthogonal": lambda: LearnedOrthogonal(D),
    }
    return [kinds[name]() for name in names]


def train(layer, x, steps=5, lr=2e-2):
    target = torch.randn(*x.shape[:-1], OUT, generator=torch.Generator().manual_seed(9)).to(x.dtype)
    groups = parameter_groups([layer])
    optimizer = torch.optim.AdamW([{"params": groups["transform"]}, {"params": groups["clip"]}], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()


STACKS = [
    (),
    ("scale",),
    ("hadamard",),
    ("kronecker",),
    ("affine",),
    ("orthogonal",),
    ("scale", "kronecker"),
    ("kronecker", "scale"),
    ("scale", "hadamard", "affine", "orthogonal"),
]


SHIFT = torch.linspace(-3, 9, D)


@pytest.mark.parametrize("names", STACKS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("shift, bias", [(None, True), (SHIFT, True), (SHIFT, False)])
def test_with_quantizers_off_the_layer_is_its_linear(names, dtype, tolerance, shift, bias):
    linear = make_linear(dtype, bias)
    layer = QuantizedLinear(linear, 4, 4, make_transforms(*names), shift=shift).to(dtype)
    x = torch.randn(2, 9, D, dtype=dtype)
    with torch.no_grad():
        expected = linear(x)
    train(layer, x)
    set_quantizers([layer], weights=False, acts=False)
    assert (layer(x) - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("names", STACKS)
@pytest.mark.parametrize("act_bits", [4, 6, None])
@pytest.mark.parametrize("shift, act_format", [(None, "int"), (SHIFT, "full_range")])
def test_the_packed_layer_computes_what_the_frozen_layer_does(names, act_bits, shift, act_format):
    act_format = "int" if act_bits is None else act_format
    layer = QuantizedLinear(
        make_linear(bias=shift is None),
        4,
        act_bits,
        make_transforms(*names),
        shift=shift,
        act_format=act_format,
    )
    x = torch.randn(3, 11, D)
    train(layer, x)
    layer.freeze()
    packed = layer.bake()
    assert isinstance(packed, PackedLinear) and len(packed.transforms) == len(names) + (shift is not None)
    assert packed.act_format == act_format and packed.bias is not None
    with torch.no_grad():
        assert torch.allclose(layer(x), packed(x), rtol=1e-4, atol=1e-5)
        codes, scale = packed.unpacked(), packed.weight_scale
        assert torch.equal(codes.float() * scale, layer._frozen.weight)
        layer.unfreeze()
        learned = layer(x)
        assert (learned - packed(x)).norm() / packed(x).norm() < 0.1  # float32 transforms may move a tie


def test_what_is_constant_in_the_input_costs_no_error():
    """Rounding errors of the weight, and the range of the activations, are of what varies alone."""
    linear, x = make_linear(), torch.randn(200, D) * 0.1 + SHIFT
    errors = []
    for shift in (None, x.mean(0)):
        layer = QuantizedLinear(linear, 3, 4, make_transforms("hadamard"), shift=shift)
        layer.freeze()
        with torch.no_grad():
            errors.append((layer.bake()(x) - linear(x)).square().mean())
    assert errors[1] < 1e-2 * errors[0]
    constant = QuantizedLinear(linear, 2, 2, shift=SHIFT)
    torch.testing.assert_close(constant(SHIFT.half().float()[None]), linear(SHIFT.half().float()[None]))


@pytest.mark.parametrize("names", STACKS)
@pytest.mark.parametrize("branch", [False, True])
def test_without_rounded_inputs_the_bias_takes_the_whole_shift(names, branch):
    layer = QuantizedLinear(make_linear(), 3, None, make_transforms(*names), shift=SHIFT)
    if branch:
        layer.set_branch(torch.randn(4, D) / D**0.5, torch.randn(OUT, 4), subtract=True)
    packed, x = layer.bake(), torch.randn(7, D) + SHIFT
    assert [t.kind for t in packed.transforms] == [t.kind for t in layer._frozen.transforms[1:]]
    with torch.no_grad():
        torch.testing.assert_close(packed(x), layer(x), rtol=1e-4, atol=1e-4)
        mean = SHIFT.half().float()[None]
        torch.testing.assert_close(packed(mean), make_linear()(mean), rtol=1e-4, atol=1e-4)
    again = QuantizedLinear(make_linear(), 3, None, shift=SHIFT)
    again.bake(codes=torch.zeros(OUT, D, dtype=torch.int8))  # of other codes the bias is another one
    torch.testing.assert_close(again.bake().bias, make_linear()(SHIFT.half().float()), rtol=1e-4, atol=1e-4)
    none = QuantizedLinear(make_linear(bias=False), 3, None, shift=SHIFT)
    # trained where the original has none: a folder keeps it by the shift
    none.bias = torch.nn.Parameter(torch.ones(OUT))
    assert [t.kind for t in none.bake().transforms] == ["channel_shift"]
    half = QuantizedLinear(make_linear(torch.bfloat16), 3, None, shift=SHIFT)
    assert half.bake().bias.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["branch", "branch beside", "rounded base"])
def test_a_shift_goes_with_branches_and_adapters(kind):
    """At the mean of the inputs the layer is its original, whatever else stands beside the weight."""
    linear, z = make_linear(), SHIFT.half().float()
    layer = QuantizedLinear(linear, 3, 4, make_transforms("hadamard"), shift=SHIFT)
    with torch.no_grad():
        expected = linear(z[None])
        if kind == "rounded base":
            _round_base(layer)
        else:
            down, up = torch.randn(4, D) / D**0.5, torch.randn(OUT, 4)
            layer.set_branch(down, up, subtract=kind == "branch")
        torch.testing.assert_close(layer(z[None]), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.bake()(z[None]), expected, rtol=1e-4, atol=1e-4)


def test_the_weight_of_a_shifted_layer_is_not_fused():
    """diffusers' fuse_projections takes weight and bias, which are not the layer without the shift."""
    packed = [QuantizedLinear(make_linear(), 4, 4, shift=shift).bake() for shift in (None, SHIFT)]
    assert packed[0].weight.data.shape == packed[1].weight.shape == (OUT, D)
    with pytest.raises(AttarError, match="shifted inputs"):
        _ = packed[1].weight.data


def test_codes_of_another_rounding_reach_the_packed_layer():
    layer = QuantizedLinear(make_linear(), 4, 6, make_transforms("scale"))
    weight, scale = layer.baked_weight()
    codes = (weight / scale).floor().clamp(-8, 7).to(torch.int8)
    packed = layer.bake(codes)
    assert layer.is_frozen and torch.equal(packed.unpacked(), codes)
    x = torch.randn(4, D)
    assert torch.allclose(layer(x), packed(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(AttarError, match="do not fit"):
        layer.freeze(codes[:, :-1])
    with pytest.raises(AttarError, match="do not fit"):
        layer.freeze(torch.full_like(codes, 8))


@pytest.mark.parametrize("names", STACKS)
def test_group_scales_of_a_weight_only_layer(names):
    layer = QuantizedLinear(make_linear(), 3, None, make_transforms(*names), group_size=16)
    x = torch.randn(5, D)
    train(layer, x)
    layer.freeze()
    packed = layer.bake()
    assert packed.weight_scale.shape == (OUT, 3)
    assert torch.equal(packed.dequantized(), layer._frozen.weight)
    assert torch.allclose(layer(x), packed(x), rtol=1e-4, atol=1e-4)


def test_groups_that_cannot_be():
    with pytest.raises(AttarError, match="group scales"):
        QuantizedLinear(make_linear(), 4, 4, group_size=16)
    with pytest.raises(AttarError, match="groups of 7"):
        QuantizedLinear(make_linear(), 4, None, group_size=7)


def test_error_falls_with_bits_to_nothing_at_sixteen():
    linear, x = make_linear(), torch.randn(64, D)
    with torch.no_grad():
        y = linear(x)
        layers = [QuantizedLinear(linear, b, b, make_transforms("scale", "kronecker")) for b in (3, 4, 6, 8)]
        errors = [((layer(x) - y).norm() / y.norm()).item() for layer in layers]
        plain = QuantizedLinear(linear, 16, 16, weight_clip=False, act_clip=False)
        assert (plain(x) - y).norm() / y.norm() < 1e-3
    assert errors == sorted(errors, reverse=True)


def test_clipping_starts_at_0_982_and_learns():
    layer = QuantizedLinear(make_linear(), 4, 4)
    assert layer.quantizer.clip.flatten()[0].item() == pytest.approx(0.98201, abs=1e-5)
    assert layer.quantizer.clip.shape == (2, OUT, 1)
    layer(torch.randn(30, D)).square().sum().backward()
    assert (layer.act_clip_logit.grad != 0).all()
    assert (layer.quantizer.clip_logit.grad != 0).float().mean() > 0.9
    assert layer.weight.grad is None and layer.bias.grad is None
    assert QuantizedLinear(make_linear(), 4, None).act_clip_logit is None
    plain = QuantizedLinear(make_linear(), 4, 4, weight_clip=False, act_clip=False)
    assert parameter_groups([plain]) == {"transform": [], "clip": [], "levels": [], "branch": []}


def test_evaluation_cache_follows_every_change_of_a_parameter():
    layer = QuantizedLinear(make_linear(), 4, 4, make_transforms("scale", "kronecker"))
    x = torch.randn(6, D)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
    train(layer, x, steps=1, lr=0.5)
    with torch.no_grad():
        second = layer(x)
        layer.quantizer.clip_logit.fill_(-1.0)
        third = layer(x)
        layer.weight_quant = False
        fourth = layer(x)
    assert not any(torch.equal(a, b) for a, b in ((first, second), (second, third), (third, fourth)))
    layer.weight_quant = True
    assert torch.equal(layer(x), third)  # with gradients nothing is cached


def test_fused_optimizer_steps_invalidate_the_cache():
    layer = QuantizedLinear(make_linear(), 4, 4, make_transforms("scale"))
    x = torch.randn(6, D)
    optimizer = torch.optim.AdamW(layer.clip_parameters(), lr=1.0, fused=True)
    layer(x).square().sum().backward()
    with torch.no_grad():
        before = layer(x)
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(layer(x), before)


def test_bfloat16_layer_keeps_its_dtype_and_shares_its_weight():
    linear = make_linear(torch.bfloat16, bias=False)
    layer = QuantizedLinear(linear, 4, 6, make_transforms("scale", "kronecker"))
    x = torch.randn(2, 5, D).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert layer.weight.data_ptr() == linear.weight.data_ptr() and linear.weight.requires_grad
    packed = layer.bake()
    assert packed.weight.dtype == torch.bfloat16 and packed.bias is None
    assert torch.allclose(packed(x).float(), layer(x).float(), rtol=2e-2, atol=2e-2)


def test_replacing_modules_by_name():
    parts = {"a": nn.Sequential(nn.Linear(4, 4), nn.GELU()), "b": nn.ModuleList([nn.Linear(4, 4)])}
    block = nn.ModuleDict(parts)
    for name in ("a.0", "b.0"):
        old = replace_module(block, name, QuantizedLinear(block.get_submodule(name), 4, 4))
        assert isinstance(old, nn.Linear)
    assert list(quantized_linears(block)) == ["a.0", "b.0"]
