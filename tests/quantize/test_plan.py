from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from attar.errors import AttarError
from attar.quantize.adaptive import InputSample
from attar.quantize.initialize import TransformSettings, build_transforms
from attar.quantize.linear import QuantizedLinear
from attar.quantize.low_rank import LowRankSettings
from attar.quantize.plan import SALIENT_SHARE, Forecast, Rules, forecast, plan_layers
from attar.runtime.size import packed_size


@dataclass
class Named:
    name: str
    module: nn.Module
    role: str
    kept: str | None = None


def make_model():
    roles = {"attn1.to_q": "self_attn.q", "attn2.to_k": "cross_attn.k", "ffn.0": "ffn.up"}
    roles["norm.linear"] = "modulation"
    inside = [
        Named(f"blocks.{i}.{name}", nn.Linear(32, 48), role) for i in range(2) for name, role in roles.items()
    ]
    outside = [
        Named("patch_embedding", nn.Linear(12, 32), "embedding"),
        Named("proj_out", nn.Linear(32, 12), "head"),
    ]
    return inside, outside


def plan(weights=4, acts=6, overrides=None, **options):
    return {p.name: p for p in plan_layers(*make_model(), Rules(weights, acts, overrides or {}, **options))}


def test_defaults_by_role():
    plans = plan()
    assert list(plans) == [x.name for group in make_model() for x in group]
    layer = plans["blocks.1.ffn.0"]
    assert (layer.weight_bits, layer.act_bits, layer.reason, layer.skipped) == (4, 6, None, False)
    assert (layer.in_features, layer.out_features, layer.bias) == (32, 48, True)
    modulation = plans["blocks.0.norm.linear"]
    assert (modulation.weight_bits, modulation.act_bits) == (4, None) and "modulation" in modulation.reason
    for name in ("patch_embedding", "proj_out"):
        assert plans[name].skipped and "outside" in plans[name].reason


def test_sixteen_bits_keep_a_layer_or_its_activations():
    assert all(p.skipped for p in plan(weights=16).values())
    assert all(p.act_bits is None for p in plan(acts=16).values())
    assert all(p.act_bits is None for p in plan(acts=None).values())


def test_overrides_by_role_and_name_the_last_one_wins_key_by_key():
    plans = plan(
        overrides={
            "cross_attn.*": {"weights": 8},
            "blocks.1.*": {"acts": 8},
            "blocks.1.ffn.0": {"skip": True},
            "head": {"weights": 8},
            "embedding": {"acts": 6},
            "modulation": {"weights": 16},
        }
    )
    bits = {name: (p.weight_bits, p.act_bits) for name, p in plans.items()}
    assert bits["blocks.0.attn2.to_k"] == (8, 6)
    assert bits["blocks.1.attn2.to_k"] == (8, 8)
    assert bits["blocks.1.attn1.to_q"] == (4, 8)
    assert bits["blocks.1.ffn.0"] == (None, None)
    assert bits["proj_out"] == (8, None)
    assert bits["patch_embedding"] == (None, None)  # activations alone do not quantize a skipped layer
    assert bits["blocks.1.norm.linear"] == (None, None)
    assert plans["blocks.1.ffn.0"].reason == "set for this layer"
    assert plans["blocks.1.attn1.to_q"].reason == "override 'blocks.1.*'"


def test_layers_that_calibration_cannot_help_are_plain():
    assert {n for n, p in plan().items() if p.plain} == {n for n in plan() if "norm" in n}
    plans = plan(acts=16, overrides={"head": {"weights": 8}})
    assert {n for n, p in plans.items() if p.plain} == {n for n in plans if "norm" in n} | {"proj_out"}
    assert not any(p.plain for p in plan(overrides={"modulation": {"acts": 8}}).values())


def test_calibrated_modulation_has_no_scale_and_no_rotation():
    plans = plan(overrides={"head": {"weights": 8}}, calibrate_modulation=True)
    assert {n for n, p in plans.items() if p.plain} == {"proj_out"}
    assert {n for n, p in plans.items() if p.one_token} == {n for n in plans if "norm" in n}
    assert {n for n, p in plans.items() if p.transformed} == {
        n for n, p in plans.items() if not (p.skipped or p.plain or p.one_token)
    }
    some = TransformSettings(shift=True, rotation="kronecker")
    norm = next(p for p in plans.values() if p.one_token)
    assert forecast(norm, some) == forecast(replace(norm, plain=True), some)  # the shift is in its bias
    without = replace(norm, bias=False)
    more = forecast(without, some).packed - forecast(replace(without, plain=True), some).packed
    assert more == 2 * norm.in_features + 2 * norm.out_features
    inputs = plan(overrides={"modulation": {"acts": 8}}, calibrate_modulation=True)
    assert not any(p.one_token for p in inputs.values())  # rounded inputs get all that others get


def test_groups_are_for_floating_point_activations():
    def groups(**options):
        return {p.name: p for p in plan_layers(*make_model(), Rules(4, **options))}

    plans = groups(acts=16, group_size=16)
    assert all(p.group_size == 16 for p in plans.values() if not p.skipped)
    plans = groups(acts=6, group_size=16)
    assert {n for n, p in plans.items() if p.group_size} == {n for n in plans if "norm" in n}
    uneven = groups(acts=16, group_size=24)["blocks.0.ffn.0"]
    assert uneven.group_size is None and "24 does not divide" in uneven.reason
    with pytest.raises(AttarError, match="there is none"):
        groups(acts=6, group_size=16, overrides={"modulation": {"skip": True}})


def test_activation_bits_by_groups_of_steps():
    overrides = {"ffn.up": {"acts": [4, 4]}, "blocks.1.ffn.0": {"acts": 7}, "cross_attn.k": {"acts": (5, 6)}}
    plans = plan_layers(*make_model(), Rules(4, [8, 6], overrides, step_groups=2))
    found = {p.name: (p.act_bits, p.act_groups, p.bits) for p in plans}
    assert found["blocks.0.attn1.to_q"] == (8, (8, 6), "W4A8/6")
    assert found["blocks.0.ffn.0"] == (4, None, "W4A4") and found["blocks.1.ffn.0"] == (7, None, "W4A7")
    assert found["blocks.0.attn2.to_k"] == (6, (5, 6), "W4A5/6")
    assert found["blocks.0.norm.linear"][:2] == (None, None)
    for acts, groups, says in (
        ([8, 6], 1, "for one group of steps"),
        ([8, 6], 3, "for 3 groups of steps"),
        ([8, 16], 2, "16 bits in a group"),
        ([8, True], 2, "True bits in a group"),
    ):
        with pytest.raises(AttarError, match=says):
            plan_layers(*make_model(), Rules(4, acts, step_groups=groups))
    with pytest.raises(AttarError, match="fp8"):  # which has eight bits alone
        plan_layers(*make_model(), Rules(4, [8, 6], act_format="fp8", step_groups=2))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weights": 1}, "weights cannot be 1"),
        ({"weights": 9}, "9"),
        ({"weights": True}, "True"),
        ({"acts": 1}, "acts"),
        ({"weights": None}, "None"),
        ({"overrides": {"ffn.up": {"weight": 4}}}, "weights, acts and skip"),
        ({"overrides": {"ffn.up": {"weights": 12}}}, "12"),
        ({"overrides": {"ffn.up": {"skip": "yes"}}}, "skip"),
        ({"overrides": {"ffn.middle": {"weights": 8}}}, "matches no layer"),
        ({"overrides": {"ffn.up": 8}}, "knows"),
    ],
)
def test_bad_plans_are_refused(arguments, message):
    with pytest.raises(AttarError, match=message):
        plan(**arguments)


@pytest.mark.parametrize("rotation", ["none", "kronecker", "orthogonal", "hadamard"])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("weights, acts, group", [(4, 6, None), (3, 8, None), (5, None, 8), (8, None, None)])
def test_forecast_is_what_the_packed_layer_weighs(rotation, scale, weights, acts, group):
    torch.manual_seed(0)
    for d, out, bias in ((48, 10, True), (24, 7, False)):
        linear = nn.Linear(d, out, bias=bias, dtype=torch.bfloat16)
        settings = TransformSettings(scale=scale, rotation=rotation)
        (layer_plan,) = plan_layers([Named("x", linear, "ffn.up")], [], Rules(weights, acts))
        found = forecast(replace(layer_plan, group_size=group), settings)
        transforms = build_transforms(linear, torch.ones(d), settings)
        packed = QuantizedLinear(linear, weights, acts, transforms, group_size=group).bake()
        assert found.packed == packed_size(packed)["total"]
        assert found.dense == 2 * (d * out + out * bias)


def test_an_adaptive_rotation_is_forecast_as_a_mixture():
    """Which rotation a layer gets shows on data only; one of either kind weighs what it weighs."""
    linear = nn.Linear(48, 10, dtype=torch.bfloat16)
    (layer_plan,) = plan_layers([Named("x", linear, "ffn.up")], [], Rules(4, 6))
    weights = {}
    for threshold in (0.0, 2.0):
        settings = TransformSettings(rotation="adaptive", rotation_threshold=threshold)
        sample = InputSample(1.0, 3.0, torch.randn(20, 48))
        transforms = build_transforms(linear, torch.ones(48), settings, sample=sample)
        weights[threshold] = packed_size(QuantizedLinear(linear, 4, 6, transforms).bake())["total"]
    expected = SALIENT_SHARE * weights[0.0] + (1 - SALIENT_SHARE) * weights[2.0]
    assert weights[0.0] - weights[2.0] > 8 * 48 * 40
    assert forecast(layer_plan, TransformSettings(rotation="adaptive")).packed == pytest.approx(
        expected, abs=1
    )


@pytest.mark.parametrize("group", [None, 8])
def test_twin_log_tables_are_forecast_by_row(group):
    linear = nn.Linear(48, 10)
    (layer_plan,) = plan_layers([Named("x", linear, "ffn.up")], [], Rules(3, 16, weight_format="twin_log"))
    layer = QuantizedLinear(linear, 3, None, group_size=group, weight_format="twin_log").bake()
    settings = TransformSettings(scale=False, rotation="none")
    found = forecast(replace(layer_plan, group_size=group), settings)
    assert found.packed == packed_size(layer)["total"] - 2 * 10  # the bias is stored in float32 here


@pytest.mark.parametrize(("name", "bits"), [("power", 3), ("binary", 1), ("dual_binary", 2), ("residual", 3)])
@pytest.mark.parametrize(("acts", "group"), [(6, None), (None, 8)])
def test_forecast_counts_the_tables(name, bits, acts, group):
    linear = nn.Linear(48, 10, dtype=torch.bfloat16)
    (layer_plan,) = plan_layers(
        [Named("x", linear, "ffn.up")], [], Rules(bits, acts, group_size=group, weight_format=name)
    )
    found = forecast(layer_plan, TransformSettings(scale=False, rotation="none"))
    layer = QuantizedLinear(linear, bits, acts, group_size=group, weight_format=name)
    assert found.packed == packed_size(layer.bake())["total"]


def test_one_bit_is_for_formats_that_have_it():
    (only,) = plan_layers([Named("x", nn.Linear(8, 8), "ffn.up")], [], Rules(1, 6, weight_format="binary"))
    assert only.bits == "W1A6-binary"
    for name in ("int", "nf4", "dual_binary"):
        with pytest.raises(AttarError, match="weights cannot be 1 bits") as raised:
            plan_layers([Named("x", nn.Linear(8, 8), "ffn.up")], [], Rules(1, 6, weight_format=name))
        assert raised.value.fix == "Choose between 2 and 8, or 16 for full precision"
    with pytest.raises(AttarError, match="acts cannot be 1 bits"):
        plan_layers([Named("x", nn.Linear(8, 8), "ffn.up")], [], Rules(1, 1, weight_format="binary"))


def test_forecast_of_a_kept_layer_and_sums():
    plans = plan()
    kept = forecast(plans["proj_out"], TransformSettings())
    assert kept == Forecast(2 * (32 * 12 + 12), 2 * (32 * 12 + 12))
    assert kept + Forecast(1, 2) == Forecast(kept.dense + 1, kept.packed + 2)
    with pytest.raises(AttarError, match="groups"):
        forecast(replace(plans["blocks.0.ffn.0"], group_size=5), TransformSettings())


def test_a_branch_for_rounded_inputs_stands_beside_them_alone():
    def ranks(acts, **branch):
        plans = plan(4, acts, low_rank=LowRankSettings(**branch), calibrate_modulation=True)
        return {name: p.low_rank for name, p in plans.items() if not p.skipped}

    few = ranks(4, rank=4, rounded_inputs=True)
    assert few == {name: 0 if "norm" in name else 4 for name in few}
    for none in (ranks(16, rank=4, rounded_inputs=True), ranks(4, rank=5, rounded_inputs=True)):
        assert not any(none.values())
    assert set(ranks(6, rank=4).values()) == {4}  # in all layers
    with pytest.raises(AttarError, match="no smaller than the layer"):
        ranks(4, rank=33)
