"""What the adapter knows of U-Nets, on the real classes."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from support import tiny, unets
from torch import nn

from attar.calibration.catch import catch_block_calls
from attar.errors import AttarError
from attar.losses.token_weighted import streams_token_weighted_mse
from attar.models.adapter import ModelAdapter
from attar.models.attention_mass import attention_mass
from attar.models.block import run_block
from attar.models.concatenations import concatenations
from attar.planning import plan_component
from attar.quantize.plan import LayerPlan, Rules, open_planned, plan_layers
from attar.recipe import load_recipe
from attar.samples import SegmentStarts
from attar.workspace import Workspace

NAMES = list(unets.MODELS)


def make(name, batch=2):
    build, call = unets.MODELS[name]
    model = build()
    return model, ModelAdapter.of(model), call(model, batch)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_a_role_and_a_place(name):
    model, adapter, _ = make(name)
    inside = [x for block in adapter.blocks for x in adapter.linears(block)]
    outside = adapter.outside_linears()
    layers = [p for p, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert sorted(x.name.removesuffix(".linear") for x in [*inside, *outside]) == sorted(layers)
    assert not [x.name for x in [*inside, *outside] if x.role == "other"]
    roles = {x.name: x.role for x in [*inside, *outside]}
    assert roles["conv_in.linear"] == "embedding" and roles["conv_out.linear"] == "head"
    assert roles["time_embedding.linear_1"] == "time_conditioning"
    assert roles["down_blocks.0.downsamplers.0.conv.linear"] == "downsample"
    assert roles["up_blocks.0.upsamplers.0.conv.linear"] == "upsample"
    found = {
        "conv1.linear": "conv1",
        "conv2.linear": "conv2",
        "conv_shortcut.linear": "shortcut",
        "time_emb_proj": "time",
    }
    for leaf, role in found.items():
        assert roles[f"up_blocks.1.resnets.0.{leaf}"] == f"resnet.{role}"
    plans = {p.name: p for p in plan_layers(inside, outside, Rules(4, 6))}
    assert {p.bits for n, p in plans.items() if p.role == "resnet.time"} == {"W4A16"}
    assert all(plans[x.name].skipped for x in outside)
    assert all(plans[x.name].bits == "W4A6" for x in inside if x.role != "resnet.time")


@pytest.mark.parametrize("name", NAMES)
def test_units_chained_in_segments_reproduce_the_model(name):
    """Every unit, also with its convolutions opened, gives in the chain what it gives in the model."""
    model, adapter, call = make(name)
    adapter.observe(call)
    with torch.no_grad():
        full = model(**call, return_dict=False)[0]
        for segment in adapter.segments:
            (state,) = catch_block_calls(model, adapter, segment[0].index, [call])
            for block in segment:
                (caught,) = catch_block_calls(model, adapter, block.index, [call])
                assert all(torch.equal(caught.streams[k], state.streams[k]) for k in state.streams)
                state = state.with_streams(run_block(block.module, state, block.outputs))
        plans = plan_layers(
            [x for b in adapter.blocks for x in adapter.linears(b)], adapter.outside_linears(), Rules(4, 6)
        )
        open_planned(model, {p.name: p for p in plans})
        assert not any(isinstance(m, nn.Conv2d) for m in model.modules())
        torch.testing.assert_close(model(**call, return_dict=False)[0], full, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_one_forward_catches_the_inputs_of_all_segments(name, tmp_path):
    model, adapter, _ = make(name)
    calls = [unets.MODELS[name][1](model, 1, seed=i) for i in range(4)]
    samples = [calls[:2], calls[2:]]  # two samples of two branches
    adapter.observe(calls[0])
    heads = [segment[0] for segment in adapter.segments]
    runs = []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    starts = SegmentStarts(model, adapter, heads, samples, Workspace(tmp_path), "unet")
    handle.remove()
    assert len(runs) == 4
    for head in heads:
        assert head.index in starts
        alone = catch_block_calls(model, adapter, head.index, calls)
        for call, a, b in zip(starts.take(head.index), alone[::2], alone[1::2], strict=True):
            for key, stream in call.streams.items():
                assert torch.equal(stream, torch.cat([a.streams[key], b.streams[key]]))
        assert head.index not in starts
    starts.end()
    assert not list((tmp_path / "unet").iterdir())


def test_an_attention_that_stands_alone_weighs_its_pixels():
    """Its mass is over H·W tokens, and λ of a pixel weighs all channels of that pixel."""
    model, adapter, call = make("unet2d")
    adapter.observe(call)
    block = next(b for b in adapter.blocks if b.name == "mid_block.attentions.0")
    assert [a.kind for a in adapter.attentions(block)] == ["self"]
    (caught,) = catch_block_calls(model, adapter, block.index, [call])
    with torch.no_grad(), attention_mass(adapter, block) as mass:
        out = run_block(block.module, caught, block.outputs)
    (found,) = mass.per_stream().values()
    height, width = out["hidden_states"].shape[2:]
    heads = block.module.heads
    assert found.shape == (2, height * width)
    torch.testing.assert_close(
        found.sum(1), torch.full((2,), float(heads * height * width)), rtol=1e-4, atol=0
    )
    target, weights = tiny.randn(2, 3, 4, 5), tiny.randn(2, 20, seed=1).abs()
    pred = tiny.randn(2, 3, 4, 5, seed=2)
    expected = ((pred - target).square() * weights.view(2, 1, 4, 5)).mean()
    got = streams_token_weighted_mse({"x": pred}, {"x": target}, {"x": weights})
    torch.testing.assert_close(got, expected)
    plain = streams_token_weighted_mse({"x": pred}, {"x": target}, {})
    torch.testing.assert_close(plain, (pred - target).square().mean())


@pytest.mark.parametrize("name", NAMES)
def test_layers_behind_skip_connections_are_seen(name):
    model, adapter, call = make(name)
    splits = concatenations(model)
    channels = {n: m.in_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    behind = {n: sizes for n, sizes in splits.items() if n in channels}
    assert set(behind) == {
        f"up_blocks.{i}.resnets.{k}.{leaf}"
        for i in (0, 1)
        for k in (0, 1)
        for leaf in ("conv1", "conv_shortcut")
    }
    assert all(len(sizes) == 2 and sum(sizes) == channels[n] for n, sizes in behind.items())
    adapter.splits = splits
    plans = {p.name: p for b in adapter.blocks for p in plan_layers(adapter.linears(b), [], Rules(4, 6))}
    first = plans["up_blocks.0.resnets.1.conv1.linear.parts.0"]
    second = plans["up_blocks.0.resnets.1.conv1.linear.parts.1"]
    assert (first.in_features, second.in_features) == (32 * 9, 16 * 9) and first.bias and not second.bias
    with torch.no_grad():
        full = model(**call, return_dict=False)[0]
        open_planned(model, plans)
        torch.testing.assert_close(model(**call, return_dict=False)[0], full, atol=1e-5, rtol=1e-4)


def test_parts_are_kept_together():
    adapter = ModelAdapter.of(unets.condition())
    adapter.splits = concatenations(adapter.transformer)
    linears = [x for b in adapter.blocks for x in adapter.linears(b)]
    with pytest.raises(AttarError, match="one part of a split layer"):
        plan_layers(linears, [], Rules(4, 6, {"*.conv1.linear.parts.1": {"skip": True}}))


def test_only_known_u_nets_are_watched():
    with pytest.raises(AttarError, match="not known of this U-Net"):
        concatenations(tiny.wan())
    recipe = load_recipe("smoothquant", {"quantize.split": True})
    plain = load_recipe("smoothquant")
    assert plan_component(tiny.wan(), recipe) == plan_component(tiny.wan(), plain)  # nothing to split
    parts = [p.name for p in plan_component(unets.condition(), recipe) if ".parts." in p.name]
    assert parts and not [p.name for p in plan_component(unets.condition(), plain) if ".parts." in p.name]


def test_convolutions_in_groups_stay_and_the_plan_says_why():
    model = unets.condition()
    resnet = model.mid_block.resnets[0]
    resnet.conv1 = nn.Conv2d(32, 32, 3, padding=1, groups=4)
    adapter = ModelAdapter.of(model)
    plans: list[LayerPlan] = plan_layers(
        [x for b in adapter.blocks for x in adapter.linears(b)], [], Rules(4, 6)
    )
    (kept,) = [p for p in plans if p.skipped]
    assert kept.name == "mid_block.resnets.0.conv1" and kept.reason == "a convolution in 4 groups"
    resnet.conv1 = resnet.conv_again = nn.Conv2d(32, 32, 3, padding=1)
    plans = plan_layers(
        adapter.linears(next(b for b in adapter.blocks if b.module is resnet)), [], Rules(4, 6)
    )
    assert [p.reason for p in plans if p.skipped] == ["a convolution of several names"]


def test_the_real_stable_diffusion_is_almost_all_in_units():
    """Of the configuration of Stable Diffusion 1.5: 44 units, which hold 97 % of 860 million weights."""
    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=768)
    adapter = ModelAdapter.of(model)
    plans = plan_layers(
        [x for b in adapter.blocks for x in adapter.linears(b)], adapter.outside_linears(), Rules(4, 8)
    )
    planned = sum(p.in_features * p.out_features for p in plans if not p.skipped)
    total = sum(p.numel() for p in model.parameters())
    assert len(adapter.blocks) == 44 and total > 859e6 and planned / total > 0.968
    kept = {p.role for p in plans if p.skipped}
    assert kept == {"embedding", "time_conditioning", "transformer.in", "transformer.out", "head"}


def test_a_u_net_of_unknown_units_is_refused():
    model = nn.Module()
    model.down_blocks, model.up_blocks = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(AttarError, match="no unit of a U-Net found"):
        ModelAdapter.of(model)
