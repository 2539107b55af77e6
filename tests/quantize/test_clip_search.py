"""Clipping that starts where rounding errs least, and GPTQ that makes up for what clipping cuts off."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.block_case import Case
from torch import nn

from attar.errors import AttarError
from attar.quantize import block, clip_search
from attar.quantize.block_settings import BlockSettings
from attar.quantize.initialize import TransformSettings
from attar.quantize.linear import QuantizedLinear
from attar.quantize.reconstruct import ReconstructionSettings
from attar.quantize.rounding import gptq_codes
from attar.recipe import load_recipe

OUT, IN = 24, 256


def layer_of(weight, bits=3, act_bits=None, **options):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return QuantizedLinear(linear, bits, act_bits, **options)


def row_errors(layer, weight):
    return (layer.rounded(weight) - weight).square().sum(1)


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.5), (3, 0.6), (4, 0.85)])
def test_normal_rows_are_rounded_much_better(bits, gain):
    torch.manual_seed(0)
    weight = torch.randn(OUT, 1024)
    layer = layer_of(weight, bits)
    before = row_errors(layer, weight)
    layer.search_clip()
    after = row_errors(layer, weight)
    assert (after <= before).all() and after.sum() < gain * before.sum()
    # the best uniform quantizers of a normal number: 3, 7 and 15 levels of equal step
    best = {2: 0.1902, 3: 0.0440, 4: 0.01246}[bits]
    assert after.mean() / 1024 < 1.1 * best


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.78), (3, 0.85), (4, 0.9)])
def test_one_code_more_lowers_the_error_of_normal_rows(bits, gain):
    """2^b numbers for 2^b - 1. The sign of a row's scale says which end has one more; codes are integers as ever."""
    torch.manual_seed(0)
    weight = torch.randn(OUT, 1024)
    errors = []
    for number in ("int", "full_range"):
        layer = layer_of(weight, bits, weight_format=number)
        layer.search_clip()
        errors.append(row_errors(layer, weight).sum())
    assert errors[1] < gain * errors[0]
    packed = layer.bake()
    assert packed.weight_format == "int" and {-1.0, 1.0} == set(packed.weight_scale.sign().unique().tolist())
    torch.testing.assert_close(packed.weight, layer.rounded(weight))
    smallest = packed.numbers().flatten(1).amin(1)
    assert (smallest == -(2 ** (bits - 1))).all()


def test_rows_with_one_long_end_put_the_code_there():
    torch.manual_seed(0)
    weight = torch.rand(OUT, 64) * 1.5 - 0.5
    weight[::2] *= -1
    layer = layer_of(weight, 3, weight_format="full_range")
    layer.search_clip()
    sign = layer.bake().weight_scale[:, 0].sign()
    assert (sign[::2] == 1).all() and (sign[1::2] == -1).all()  # -4 stands for the long end


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99), bits=st.integers(2, 6), groups=st.sampled_from([None, 32]), tail=st.booleans(),
    number=st.sampled_from(["int", "full_range"]),
)  # fmt: skip
def test_it_never_makes_a_row_or_group_worse(seed, bits, groups, tail, number):
    torch.manual_seed(seed)
    weight = torch.distributions.StudentT(2.5).sample((OUT, 64)) if tail else torch.rand(OUT, 64) - 0.3
    layer = layer_of(weight, bits, group_size=groups, weight_format=number)
    before = (layer.rounded(weight) - weight).square().view(OUT, -1, groups or 64).sum(-1)
    layer.search_clip()
    after = (layer.rounded(weight) - weight).square().view(OUT, -1, groups or 64).sum(-1)
    assert (after <= before * (1 + 1e-5)).all()
    once = layer.quantizer.clip_logit.clone()
    assert (once <= 4.0).all() and torch.isfinite(once).all()


@pytest.mark.parametrize("weight_format", ["int", "full_range", "power", "lloyd"])
@pytest.mark.parametrize("groups", [None, 32])
def test_rows_by_few_are_rows_at_once_and_no_other_share_is_better(weight_format, groups):
    """Against trying one share of all rows after another."""
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(2.5).sample((OUT, 64))
    layer = layer_of(weight, 3, group_size=groups, weight_format=weight_format)
    quantizer, logits = layer.quantizer, []
    for few in (1, 1 << 14, 1 << 30):
        quantizer.clip_logit.data.fill_(4.0)
        quantizer.fit(weight)
        levels = quantizer.levels
        with mock.patch.dict(clip_search.AT_ONCE, {"cpu": few}):
            logits.append(
                clip_search.searched_clip(
                    weight, 4.0, 3, quantizer.clip_logit.shape[2], quantizer.grid.number, levels
                ).transpose(0, 1)
            )
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])

    def errors():
        return (quantizer(weight) - weight).square().view(OUT, -1, groups or 64).sum(-1)

    quantizer.clip_logit.data.copy_(logits[0])
    best = errors()
    grouped = weight.view(OUT, -1, groups or 64)
    low, high = -grouped.amin(-1), grouped.amax(-1)
    for share in clip_search.SHARES:
        for side in ((1, 0.75), (0.75, 1)) if weight_format == "full_range" else ((1, 1),):
            reach = share * torch.maximum(low, high)
            ends = torch.stack([reach * side[0] / low, reach * side[1] / high])
            quantizer.clip_logit.data.copy_(ends.clamp(max=0.999).logit().clamp(max=4.0))
            assert (best <= errors() * (1 + 1e-5)).all()


def test_a_second_search_does_not_remember_the_first():
    torch.manual_seed(0)
    first, second = torch.distributions.StudentT(2.5).sample((OUT, IN)), torch.rand(OUT, IN) - 0.5
    layer, fresh = layer_of(first), layer_of(second)
    layer.search_clip()
    layer.weight.data.copy_(second)
    layer.search_clip()
    fresh.search_clip()
    assert torch.equal(layer.quantizer.clip_logit, fresh.quantizer.clip_logit)


def test_uniform_rows_and_rows_of_zeros_keep_their_range():
    weight = torch.cat([torch.linspace(-1, 1, IN).expand(3, -1), torch.zeros(2, IN)])
    layer = layer_of(weight, 4)
    layer.search_clip()
    assert (layer.quantizer.clip[:, :3] > 0.9).all() and torch.isfinite(layer.rounded(weight)).all()


def test_tables_are_fitted_to_what_is_cut():
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN)
    plain, searched = (layer_of(weight, 3, weight_format="power") for _ in range(2))
    searched.search_clip()
    assert row_errors(searched, weight).sum() < row_errors(plain, weight).sum()
    assert not torch.equal(plain.levels, searched.levels)


def test_gptq_makes_up_for_what_clipping_cuts_off():
    """On correlated inputs, against the clipped weight, which knows nothing of it."""
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN)
    x = torch.randn(2000, IN) @ (torch.randn(IN, IN) / 16 + torch.eye(IN))
    hessian = 2 * x.T @ x / len(x)
    layer, exact, errors = layer_of(weight), x @ weight.T, {}
    layer.search_clip()
    for whole in (True, False):
        layer.freeze(gptq_codes(layer, hessian, 0.01, 128, whole))
        errors[whole] = (layer.bake()(x) - exact).square().mean().item()
        layer.unfreeze()
    layer.freeze()
    errors["nearest"] = (layer.bake()(x) - exact).square().mean().item()
    assert errors[True] < 0.8 * errors[False]
    assert errors[True] < 0.8 * errors["nearest"]


def test_without_anything_to_cut_off_both_are_one():
    torch.manual_seed(0)
    weight, x = torch.randn(OUT, IN), torch.randn(500, IN)
    layer = layer_of(weight, weight_clip=False)
    hessian = 2 * x.T @ x / len(x)
    assert torch.equal(
        gptq_codes(layer, hessian, 0.01, 64, True), gptq_codes(layer, hessian, 0.01, 64, False)
    )


def test_columns_by_activation_are_gptq_of_the_columns_in_another_order():
    torch.manual_seed(0)
    weight, x = torch.randn(OUT, 64), torch.randn(900, 64) * torch.rand(64) ** 3
    x = x @ (torch.eye(64) + 0.3 * torch.randn(64, 64) / 8)
    hessian = 2 * x.T @ x / len(x)
    order = hessian.diagonal().argsort(descending=True)
    layer = layer_of(weight)
    found = gptq_codes(layer, hessian, 0.01, 16, by_activation=True)
    other = gptq_codes(layer_of(weight[:, order]), hessian[order][:, order], 0.01, 16)
    assert torch.equal(found[:, order], other)
    errors = {}
    for by_activation in (True, False):
        layer.freeze(gptq_codes(layer, hessian, 0.01, 16, by_activation=by_activation))
        errors[by_activation] = (layer.bake()(x) - x @ weight.T).square().mean().item()
        layer.unfreeze()
    assert errors[True] < errors[False]
    assert torch.equal(
        gptq_codes(layer, torch.eye(64), 0.01, 16, by_activation=True), layer.quantizer.quantize(weight)[0]
    )
    # scales and tables of groups stay those of the columns' own groups
    for options in ({"bits": 3}, {"bits": 3, "weight_format": "lloyd"}):
        grouped = layer_of(weight, group_size=16, **options)
        for by_activation in (True, False):
            grouped.freeze(gptq_codes(grouped, hessian, 0.01, 16, by_activation=by_activation))
            errors[by_activation] = (grouped.bake()(x) - x @ weight.T).square().mean().item()
            grouped.unfreeze()
        grouped.freeze()
        assert errors[True] < errors[False] < (grouped.bake()(x) - x @ weight.T).square().mean().item()


def test_a_block_that_learns_for_its_activations_alone():
    """Clipping of weights is left alone by learning, and searched behind it, for the transforms as they are then."""
    settings = BlockSettings(
        TransformSettings(), learning=ReconstructionSettings(epochs=2), gptq_damping=0.01, clip_search=True,
        round_weights=False, gptq_whole=True, gptq_by_activation=True,
    )  # fmt: skip
    seen, own = {}, block.reconstruct_block

    def watched(run, calls, targets, groups, *rest, **more):
        layers = [m for m in case.block.module.modules() if isinstance(m, QuantizedLinear) and m.transforms]
        assert not any(layer.weight_quant for layer in layers) and any(layer.act_quant for layer in layers)
        clips = {id(p) for p in groups["clip"]}
        assert clips == {id(m.act_clip_logit) for m in layers if m.act_clip_logit is not None}
        before = [m.quantizer.clip_logit.clone() for m in layers]
        result = own(run, calls, targets, groups, *rest, **more)
        assert all(torch.equal(m.quantizer.clip_logit, b) for m, b in zip(layers, before, strict=True))
        seen["layers"], seen["before"] = layers, before
        return result

    case = Case()
    with mock.patch.object(block, "reconstruct_block", watched):
        outcome = case.quantize(settings)
    assert 0 < outcome.error_after < outcome.error_before
    assert outcome.learning.error_after <= outcome.learning.error_before
    moved = zip(seen["layers"], seen["before"], strict=True)
    assert any(not torch.equal(m.quantizer.clip_logit, before) for m, before in moved)
    for layer in seen["layers"]:
        left = layer.quantizer.clip_logit.clone()
        layer.unfreeze()
        layer.search_clip()
        assert torch.equal(layer.quantizer.clip_logit, left)  # it was searched last


def test_weight_only_layers_learn_with_their_weights_rounded():
    case = Case()
    plans = {name: replace(plan, act_bits=None) for name, plan in case.plans.items()}
    case.plans = plans
    settings = BlockSettings(
        TransformSettings(), learning=ReconstructionSettings(epochs=2), gptq_damping=0.01, clip_search=True,
        round_weights=False, gptq_whole=True,
    )  # fmt: skip
    outcome = case.quantize(settings)
    assert outcome.learning.error_before > 1e-6  # of a block without any rounding it would be zero
    assert 0 < outcome.error_after < outcome.error_before


def test_refusals_and_old_recipes():
    with pytest.raises(AttarError, match="no clipping to search"):
        layer_of(torch.randn(4, 8), weight_clip=False).search_clip()
    with pytest.raises(AttarError, match="clip_search needs weight_clip"):
        load_recipe("attar-ptq", {"quantize.clip_search": True, "quantize.weight_clip": False})
    content = load_recipe("s2q-vdit").model_dump()
    assert "clip_search" not in content["quantize"] and not {"target", "order"} & set(content["rounding"])
    assert "round_weights" not in content["reconstruct"]
    with pytest.raises(AttarError, match="train_levels needs round_weights"):
        load_recipe("attar", {"quantize.weight_format": "lloyd", "reconstruct.train_levels": True})
    changed = load_recipe(
        "s2q-vdit", {"quantize.clip_search": True, "rounding.target": "weight"}
    ).model_dump()
    assert changed["quantize"]["clip_search"] and changed["rounding"]["target"] == "weight"
