"""The packed layer: equal to fake quantization, stable under casts, moves and copies, honest about errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attar.errors import AttarError
from attar.runtime import PackedLinear, packed_layers, packed_size
from attar.runtime.reference import dequantize, quantize, quantize_tokens, symmetric_scale
from attar.runtime.transforms import ChannelScale, Dense, Hadamard, Kronecker, transform_weight

OUT, IN = 24, 96


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def transforms():
    rotation = torch.linalg.qr(torch.randn(IN, IN, generator=generator(3)))[0]
    return [
        ChannelScale(torch.rand(IN, generator=generator(4)) + 0.5),
        Hadamard.random(IN, generator(5)),
        Kronecker(torch.eye(8) * 2, torch.eye(12) * 0.5),
        Dense(rotation),
    ]


def make(bits=4, act_bits=6, clip=(0.97, 0.95), bias=True, group_size=None, with_transforms=True):
    chain = transforms() if with_transforms else []
    weight = transform_weight(chain, torch.randn(OUT, IN, generator=generator()))
    groups = weight.unflatten(1, (-1, group_size or IN))  # (out, groups, group size)
    scale = symmetric_scale(groups.abs().amax(2), bits).float()  # (out, groups)
    codes = quantize(groups, scale[..., None], bits).flatten(1)
    bias = torch.randn(OUT, generator=generator(1)) if bias else None
    return PackedLinear.from_codes(codes, scale, bits, bias, act_bits, clip, chain, group_size)


def inputs(*shape):
    return torch.randn(*shape, IN, generator=generator(2))


def snapshot(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_exact(before, layer):
    after = dict(layer.named_buffers())
    assert before.keys() == after.keys()
    for name, buffer in before.items():
        assert after[name].dtype == buffer.dtype and torch.equal(after[name], buffer), name


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("act_bits", [4, 6, 8])
def test_equals_fake_quantization(bits, act_bits):
    layer, x = make(bits, act_bits), inputs(2, 7)
    y = x
    for transform in transforms():
        y = transform(y)
    fake_x = dequantize(*quantize_tokens(y, act_bits, (0.97, 0.95)))
    fake_weight = layer.unpacked().float() * layer.weight_scale
    assert torch.equal(layer.dequantized(), fake_weight)  # codes x scales are the weight, exactly
    expected = F.linear(fake_x.double(), fake_weight.double(), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_eight_bits_are_close_to_full_precision():
    layer, x = make(8, 8, clip=None), inputs(64)
    expected = F.linear(x, torch.randn(OUT, IN, generator=generator()), layer.bias)
    assert float((layer(x) - expected).norm() / expected.norm()) < 0.02


def test_lowest_code_is_kept():
    codes = torch.full((3, 5), -8, dtype=torch.int8)
    layer = PackedLinear.from_codes(codes, torch.full((3, 1), 0.5), 4)
    assert torch.equal(layer.unpacked(), codes) and torch.equal(layer.weight, torch.full((3, 5), -4.0))


@pytest.mark.parametrize("group_size", [None, 8, 32, 96])
@pytest.mark.parametrize("with_transforms", [False, True])
def test_weight_only(group_size, with_transforms):
    layer = make(4, None, None, group_size=group_size, with_transforms=with_transforms)
    x = inputs(3, 5)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)
    low = layer.to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x), rtol=0.05, atol=0.3)


def test_one_group_equals_one_scale_per_row():
    x = inputs(3)
    row, group = (make(4, None, None, group_size=g, with_transforms=False) for g in (None, IN))
    assert torch.equal(row(x), group(x))
    finer = make(4, None, None, group_size=8, with_transforms=False)
    weight = torch.randn(OUT, IN, generator=generator())
    assert (finer.weight - weight).norm() < (row.weight - weight).norm()


def test_weight_is_in_the_original_basis():
    layer = make(8, 8)
    weight = torch.randn(OUT, IN, generator=generator())
    assert layer.weight.shape == weight.shape
    assert float((layer.weight - weight).norm() / weight.norm()) < 0.02
    assert isinstance(layer, nn.Linear) and layer.is_attar_packed
    assert "weight" not in dict(layer.named_parameters())
    with pytest.raises(AttarError, match="cannot be written"):
        layer.weight.data += 1
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(weight)


WRITES = {
    "copy": lambda w: w.copy_(torch.zeros(OUT, IN)),
    "mul": lambda w: w.mul_(2),
    "data": lambda w: w.data.mul_(2),
    "assigned data": lambda w: setattr(w, "data", torch.zeros(OUT, IN)),
    "item": lambda w: w.__setitem__(0, 0.0),
    "operator": lambda w: w.__iadd__(1.0),
    "operator on data": lambda w: w.data.__imul__(2.0),
    "zeros": nn.init.zeros_,
    "normal": nn.init.normal_,
    "kaiming": nn.init.kaiming_uniform_,
    "out": lambda w: torch.add(torch.zeros(OUT, IN), 1, out=w),
    "no_grad": torch.no_grad()(lambda w: w.clamp_(0, 1)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writing_to_the_weight_is_refused(write):
    layer = make()
    before = snapshot(layer)
    with pytest.raises(AttarError, match="cannot be written"):
        write(layer.weight)
    assert_exact(before, layer)


def test_the_weight_can_be_read_in_every_way():
    layer = make()
    weight = layer.weight
    assert type(weight + 1) is type(weight.clone()) is type(weight.data.float().clone()) is torch.Tensor
    plain = torch.empty(OUT, IN).copy_(weight)
    for other in (
        pickle.loads(pickle.dumps(weight)),
        nn.Parameter(weight.data.clone()),
    ):
        assert torch.equal(other, plain)
    assert torch.equal(torch.cat([weight.data, weight]), torch.cat([plain, plain]))
    assert layer.weight.requires_grad_(False).clone().mul_(2).equal(2 * plain)


def test_a_layer_is_not_reset():
    layer = make()
    before = layer.bias.clone()
    with pytest.raises(AttarError, match="cannot be reset"):
        layer.reset_parameters()
    assert torch.equal(layer.bias, before)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float", "double"])
@pytest.mark.parametrize("bias", [True, False])
def test_casts_leave_buffers_alone(cast, bias):
    model = nn.Sequential(make(bias=bias), nn.LayerNorm(OUT))
    before = snapshot(model[0])
    dtype = {"half": torch.float16, "float": torch.float32, "double": torch.float64}.get(cast, torch.bfloat16)
    getattr(model.to(torch.bfloat16), cast)()
    assert_exact(before, model[0])
    assert model[0].compute_dtype == model[0].weight.dtype == dtype
    assert not bias or model[0].bias.dtype == dtype
    assert model[0](inputs(2).to(dtype)).dtype == dtype
    model.to(device="cpu", dtype=torch.float16)
    assert_exact(before, model[0])
    assert model[0].compute_dtype == torch.float16


def test_same_result_after_a_cast_and_back():
    layer, x = make(bias=False), inputs(4)
    expected = layer(x)
    assert torch.equal(layer.to(torch.bfloat16).half().float()(x), expected)


def test_copies_are_independent_and_equal():
    layer, x = make(), inputs(4)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        other.weight_scale *= 2
        assert not torch.equal(other(x), layer(x))


def test_layers_baked_from_one_transform_do_not_share_it():
    shared = [ChannelScale(torch.ones(8))]
    codes, scale = torch.ones(4, 8, dtype=torch.int8), torch.ones(4, 1)
    a, b = (PackedLinear.from_codes(codes, scale, 4, transforms=shared) for _ in range(2))
    a.transforms[0].scale.fill_(3)
    assert float(b.transforms[0].scale[0]) == float(shared[0].scale[0]) == 1


def test_state_dict_round_trip_into_an_empty_layer():
    layer, x = make(), inputs(4)
    empty = PackedLinear.from_scheme(layer.scheme(), IN, OUT, True)
    assert all(t.is_meta for t in empty.state_dict().values()) and empty.scheme() == layer.scheme()
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))
    real = PackedLinear.from_scheme(layer.scheme(), IN, OUT, True, device="cpu")
    real.load_state_dict(layer.state_dict())
    assert torch.equal(real(x), layer(x))


def test_meta_device():
    layer = make().to("meta")
    assert layer.weight.is_meta and layer.weight_scale.dtype == torch.float32
    assert layer(torch.empty(2, 3, IN, device="meta")).shape == (2, 3, OUT)
    assert layer.to(torch.bfloat16).weight_scale.dtype == torch.float32
    filled = layer.to_empty(device="cpu")
    assert filled.codes.device.type == "cpu" and filled.compute_dtype == torch.bfloat16


def test_autocast_does_not_touch_the_arithmetic():
    for layer in (make(), make(8, None, None)):
        expected = layer(inputs(4))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(inputs(4)), expected)


def test_gradients_are_straight_through():
    layer = make(8, 8)
    x = inputs(3).requires_grad_()
    y = layer(x)
    assert torch.equal(y.detach(), layer(x.detach()))
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * y.detach() @ layer.weight)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("frozen_input", [False, True])
@pytest.mark.parametrize("act_bits", [8, None])
def test_a_bias_is_trained_as_a_dense_one(act_bits, frozen_input):
    layer, dense = make(8, act_bits, None), nn.Linear(IN, OUT)
    dense.weight.data, dense.bias.data = layer.weight.clone(), layer.bias.data.clone()
    layer.bias.requires_grad_(True)
    out = torch.randn(2, 5, OUT, generator=generator(6))
    grads = []
    for one in (layer, dense):
        x = inputs(2, 5).requires_grad_(not frozen_input)
        (one(x) * out).sum().backward()
        grads.append((one.bias.grad, x.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    assert (grads[0][1] is None) == frozen_input
    if not frozen_input:
        torch.testing.assert_close(grads[0][1], grads[1][1])


@pytest.mark.parametrize("act_bits", [6, None])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_inputs_of_other_types_are_refused(dtype, act_bits):
    layer = make(4, act_bits, None)
    with pytest.raises(AttarError, match=f"an input of {dtype}"):
        layer(torch.ones(2, IN).to(dtype))


def test_constant_and_empty_inputs():
    layer = make()
    assert torch.isfinite(layer(torch.zeros(2, IN))).all()
    torch.testing.assert_close(layer(torch.zeros(2, IN)), layer.bias.expand(2, -1))
    assert layer(torch.zeros(0, IN)).shape == (0, OUT)


def test_a_bad_token_is_not_hidden():
    layer, x = make(with_transforms=False), inputs(3)
    expected = layer(x)
    x[1, 4] = float("nan")
    y = layer(x)
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("act_bits", [6, None])
def test_compiles_without_graph_break(act_bits):
    layer, x = make(4, act_bits, (0.97, 0.95) if act_bits else None), inputs(2, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiles_to_native_code():
    layer, x = make(), inputs(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-4, atol=0.2)


@pytest.mark.gpu
def test_cuda_equals_cpu():
    layer, x = make(), inputs(2, 8)
    before, expected = snapshot(layer), layer(x)
    y = layer.to("cuda", torch.bfloat16)(x.cuda())
    assert_exact(before, layer.to("cpu"))
    assert float((y.cpu() - expected).norm() / expected.norm()) < 0.02


CODES, SCALE = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1)


@pytest.mark.parametrize(
    "message, arguments",
    {
        "outside the 4-bit range": {"codes": CODES + 8},
        "integer matrix": {"codes": CODES.float()},
        "must be finite, and not zero": {"weight_scale": SCALE * float("nan")},
        "and not zero": {"weight_scale": SCALE * 0},
        "weight_scale has shape": {"weight_scale": torch.ones(4)},
        "bias has shape": {"bias": torch.zeros(5)},
        "needs activation quantization": {"act_clip": (0.9, 0.9)},
        "two finite factors": {"act_clip": (0.9, float("inf")), "act_bits": 8},
        "9-bit activations": {"act_bits": 9},
        "9-bit codes": {"bits": 9},
        "does not divide": {"group_size": 3},
        "cannot be combined": {"group_size": 4, "act_bits": 8, "weight_scale": torch.ones(4, 2)},
        "not a run-time transform": {"transforms": [nn.Identity()]},
    }.items(),
)
def test_invalid_layers(message, arguments):
    with pytest.raises(AttarError, match=message):
        PackedLinear.from_codes(**{"codes": CODES, "weight_scale": SCALE, "bits": 4, **arguments})


def test_size_accounting():
    model = nn.Sequential(make(4, 6, with_transforms=False), nn.Linear(OUT, 3))
    size = packed_size(model)
    assert (size["codes"], size["scales"], size["biases"]) == (OUT * IN // 2, 4 * OUT + 8, 4 * OUT)
    assert size["transforms"] == 0 and size["rest"] == 4 * (3 * OUT + 3)
    assert size["total"] == sum(size[k] for k in ("codes", "scales", "transforms", "biases", "rest"))
    assert size["weights"] == OUT * IN
    assert size["bits_per_weight"] == pytest.approx(4 + 8 * (4 * OUT + 8) / (OUT * IN))
    assert packed_size(make())["transforms"] > 4 * IN
    assert packed_size(nn.Linear(2, 2))["bits_per_weight"] == 0
    assert list(packed_layers(model)) == ["0"]
