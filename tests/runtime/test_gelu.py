"""GELU behind a packed layer: computed with the layer, of the unrounded output, and only where it follows."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from support.layers import DTYPES, bits, close_to_gelu, generator, make, seeds
from torch import nn

from attar.errors import AttarError
from attar.runtime import PackedLinear, packed_layers, use_backend
from attar.runtime.backend import backend_name
from attar.runtime.cpu.library import library
from attar.runtime.diffusers_integration import save_transformer
from attar.runtime.gelu import PackedGELU, fuse_gelu

APPROXIMATIONS = ("none", "tanh")
approximations = st.sampled_from(APPROXIMATIONS)
compiled = pytest.mark.skipif(backend_name("cpu") != "cpu", reason="no compiled kernels")


@compiled
@given(
    seed=seeds,
    approximate=approximations,
    weight_bits=bits,
    act_bits=bits,
    rows=st.integers(1, 40),
    out_features=st.integers(1, 100),
    in_features=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    clip=st.sampled_from([None, (0.97, 0.9)]),
    size=st.sampled_from([1e-4, 1.0, 30.0]),
)
@settings(deadline=None, max_examples=100)
def test_within_rounding_of_the_reference_and_equal_on_every_instruction_set(
    seed, approximate, weight_bits, act_bits, rows, out_features, in_features, dtype, bias, clip, size
):
    layer = make(out_features, in_features, weight_bits, act_bits, seed=seed, bias=bias, clip=clip)
    layer.weight_scale.mul_(size)  # from the linear part of GELU, over its bend, to both ends
    layer = layer.to(dtype)
    x = torch.randn(rows, in_features, generator=generator(seed)).to(dtype)
    outputs = []
    for level in library().levels:
        with library().use_kernels(level):
            outputs.append(close_to_gelu(layer, x, approximate))
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_the_reference_rounds_once(dtype, approximate):
    layer, x = make(60, 48, 4, 8).to(dtype), torch.randn(20, 48, generator=generator(3)).to(dtype)
    with torch.no_grad(), use_backend("reference"):
        before = layer(x if dtype == torch.float64 else x.float())
        assert torch.equal(layer(x, gelu=approximate), F.gelu(before, approximate=approximate).to(dtype))


@compiled
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_far_outputs(approximate):
    """Beyond the bend GELU is its input or zero, however far; what is not finite stays so."""
    far = [9.0, 20.0, 1e4, 1e10, 1e30, 3e38, float("inf"), -20.0, -1e4, -1e10, -1e30, -3e38]
    bias = torch.tensor([*far, -float("inf"), float("nan"), 0.0])
    layer = PackedLinear.from_codes(
        torch.zeros(len(bias), 4, dtype=torch.int8), torch.ones(len(bias), 1), 8, bias, 8
    )
    with torch.no_grad(), use_backend("cpu"):
        for level in library().levels:
            with library().use_kernels(level):
                y = layer(torch.zeros(1, 4), gelu=approximate)[0]
            assert torch.equal(y[:7], bias[:7]) and not y[7:12].any()
            assert y[12:14].isnan().all() and y[14] == 0


@compiled
@given(seeds, approximations, bits, st.sampled_from(DTYPES), st.sampled_from([None, 12]), st.booleans())
@settings(deadline=None, max_examples=25)
def test_weights_alone_take_two_steps(seed, approximate, weight_bits, dtype, group_size, bias):
    layer = make(40, 72, weight_bits, None, seed=seed, group_size=group_size, bias=bias).to(dtype)
    x = torch.randn(5, 72, generator=generator(seed)).to(dtype)
    for backend in ("reference", "cpu"):
        with torch.no_grad(), use_backend(backend):
            expected = F.gelu(layer(x), approximate=approximate)
            assert torch.equal(layer(x, gelu=approximate), expected)


def test_an_unknown_approximation():
    with pytest.raises(AttarError, match="unknown GELU 'sigmoid'"):
        make(8, 8, 4, 8)(torch.zeros(1, 8), gelu="sigmoid")


@pytest.mark.parametrize("act_bits, group_size", [(6, None), (None, 16)])
def test_the_operator_obeys_the_rules_of_torch(act_bits, group_size):
    layer = make(24, 32, 4, act_bits, group_size=group_size)
    x = torch.randn(2, 5, 32)
    arguments = (x, layer.codes, layer.weight_scale, layer.bias.detach(), None, 4, act_bits, [], [], "tanh")
    torch.library.opcheck(torch.ops.attar.packed_linear.default, arguments)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("layer", [make(24, 32, 8, 8), make(24, 32, 8, None, group_size=8)])
def test_gradients_have_the_derivative_of_gelu(layer, approximate):
    x, grad = torch.randn(4, 32, generator=generator(1)), torch.randn(4, 24, generator=generator(2))
    before = layer(x).detach().requires_grad_()
    F.gelu(before, approximate=approximate).backward(grad)
    x.requires_grad_()
    layer(x, gelu=approximate).backward(grad)
    torch.testing.assert_close(x.grad, before.grad @ layer.weight)


def feed_forward(approximate="tanh", act_bits=8, dtype=torch.float32):
    """A feed-forward of diffusers with packed layers, as it is and fused."""
    torch.manual_seed(0)
    module = FeedForward(32, activation_fn="gelu-approximate" if approximate == "tanh" else "gelu").eval()
    module.net[0].proj, module.net[2] = make(128, 32, 8, act_bits), make(32, 128, 8, act_bits, seed=1)
    module.net[0].proj.weight_scale.mul_(5)
    module = module.to(dtype)
    fused = copy.deepcopy(module)
    assert fuse_gelu(fused) == 1 and fuse_gelu(fused) == 0
    return module, fused


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_a_feed_forward_asks_its_layer(approximate, dtype):
    module, fused = feed_forward(approximate, dtype=dtype)
    assert list(module.state_dict()) == list(fused.state_dict())
    x = torch.randn(2, 7, 32, generator=generator(1)).to(dtype)
    with torch.no_grad():
        layer = fused.net[0].proj
        assert torch.equal(fused.net[0](x), layer(x, gelu=approximate))
        atol = 2 * torch.finfo(dtype).eps * float(layer(x).abs().max())  # of what the two steps round between
        torch.testing.assert_close(fused.net[0](x), module.net[0](x), rtol=0, atol=atol)
        again = pickle.loads(pickle.dumps(fused))
        assert type(again.net[0]) is PackedGELU and torch.equal(again(x), fused(x))
        moved = copy.deepcopy(fused).to(torch.bfloat16)
        assert moved(x.bfloat16()).dtype == torch.bfloat16


def test_only_a_packed_layer_is_asked():
    module, fused = feed_forward()
    dense = nn.Linear(32, 128)
    module.net[0].proj = fused.net[0].proj = dense
    x = torch.randn(2, 7, 32)
    assert torch.equal(module(x), fused(x))
    assert fuse_gelu(module) == 0 and type(module.net[0]) is GELU


def test_it_compiles_without_graph_break():
    _, fused = feed_forward()
    x = torch.randn(2, 7, 32, generator=generator(1))
    with torch.no_grad():
        run = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(x), fused(x))


@pytest.mark.parametrize("build", [tiny.wan, tiny.cogvideox, tiny.hunyuan, tiny.ltx, tiny.flux, tiny.pixart])
def test_every_family_has_such_feed_forwards(build):
    model = build()
    found = [m.proj for m in model.modules() if type(m) is GELU]
    for name, linear in list(model.named_modules()):
        if linear in found:
            model.set_submodule(name, make(linear.out_features, linear.in_features, 4, 8))
    blocks = {name for name, _ in model.named_children() if name.endswith("blocks")} - {
        "single_transformer_blocks"
    }
    assert fuse_gelu(model) == len(found) >= sum(len(getattr(model, name)) for name in blocks) > 0


def test_a_lora_beside_the_layer_comes_before_gelu(saved, call, expected):
    peft = pytest.importorskip("peft")
    model = WanTransformer3DModel.from_pretrained(saved, subfolder="transformer")
    gelu = model.blocks[0].ffn.net[0]
    assert type(gelu) is PackedGELU
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["ffn.net.0.proj"]))
    assert not isinstance(gelu.proj, PackedLinear)
    x = torch.randn(3, 64, generator=generator(1))
    with torch.no_grad():
        torch.testing.assert_close(model(**call)[0], expected, rtol=0, atol=1e-4)  # B starts at zero
        low, high = gelu.proj.lora_A["default"].weight, gelu.proj.lora_B["default"].weight
        high.normal_(std=0.3)
        wanted = F.gelu(gelu.proj.base_layer(x) + x @ low.T @ high.T, approximate="tanh")
        torch.testing.assert_close(gelu(x), wanted)
        model.unload_lora()
        torch.testing.assert_close(model(**call)[0], expected, rtol=0, atol=0)


def test_saved_and_loaded(saved, call, expected, tmp_path):
    model = WanTransformer3DModel.from_pretrained(saved, subfolder="transformer")
    assert "blocks.0.ffn.net.0.proj.codes" in model.state_dict()
    save_transformer(model, tmp_path / "again")
    for folder in (saved / "transformer", tmp_path / "again"):
        again = WanTransformer3DModel.from_pretrained(folder)
        assert sum(type(m) is PackedGELU for m in again.modules()) == len(again.blocks)
        with torch.no_grad():
            assert torch.equal(again(**call)[0], expected)
    assert packed_layers(model).keys() == packed_layers(again).keys()
