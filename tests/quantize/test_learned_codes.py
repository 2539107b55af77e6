"""Codes that are learned by the block's error, at scales that stay or that are learned with them."""

import dataclasses

import pytest
import torch
from diffusers import DiffusionPipeline
from support import pipelines
from support.block_case import Case
from torch import nn

import attar
from attar.errors import AttarError
from attar.losses import mse
from attar.models.block import BlockCall
from attar.models.linears import Linear
from attar.quantize.block import quantize_block
from attar.quantize.block_settings import BlockSettings
from attar.quantize.initialize import TransformSettings
from attar.quantize.learned_codes import LearnedCodes
from attar.quantize.linear import QuantizedLinear
from attar.quantize.plan import Rules, plan_layers
from attar.quantize.reconstruct import ReconstructionSettings
from attar.quantize.weights import Grid
from attar.recipe import load_recipe
from attar.runtime.layers import packed_layers

GPTQ = BlockSettings(TransformSettings(rotation="hadamard"), gptq_damping=0.01)
LEARNING = ReconstructionSettings(epochs=8, code_lr=2e-2, normalise_loss=True)


def layer_of(bits=3, acts=6, weight_format="int", **options):
    torch.manual_seed(0)
    layer = QuantizedLinear(nn.Linear(24, 16), bits, acts, weight_format=weight_format, **options)
    return layer.requires_grad_(False)


def test_it_starts_as_the_frozen_layer():
    layer, x = layer_of(), torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    weight, scale = layer.baked_weight()
    off = torch.where(torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.2, 1, 0)
    codes = ((weight / scale).round().clamp(-4, 3) + off).clamp(max=3).to(torch.int8)  # not the nearest
    layer.freeze(codes)
    learned = LearnedCodes(layer)
    assert torch.equal(learned.codes(), codes) and learned.codes().dtype == codes.dtype
    torch.testing.assert_close(learned(x), layer(x))
    steps, exact = learned.steps.detach(), (weight / scale).clamp(-4, 3)
    assert ((steps - codes).abs() <= 0.5).all()
    near = (exact - codes).abs() < 0.499
    torch.testing.assert_close(steps[near], exact[near])
    assert (~near).any() and ((steps - codes)[~near].abs() > 0.49).all()


def test_gradients_pass_the_rounding_and_the_largest_codes():
    layer = layer_of(acts=None)
    layer.freeze()
    learned = LearnedCodes(layer)
    with torch.no_grad():
        learned.steps[0, :2] = torch.tensor([5.0, -7.0])
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weighted = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    (learned(x) * weighted).sum().backward()
    expected = (weighted.T @ x.detach()) * layer.baked_weight()[1]
    torch.testing.assert_close(learned.steps.grad, expected)
    rounded = learned.codes().float() * layer.baked_weight()[1]
    torch.testing.assert_close(x.grad, weighted @ rounded)
    assert learned.codes()[0, :2].tolist() == [3, -4]


def test_rows_of_several_kinds_keep_to_their_bits():
    layer = layer_of()
    layer.mix_rows([Grid(2), Grid(4)], torch.arange(16) % 2)
    layer.freeze()
    learned = LearnedCodes(layer)
    assert learned.largest.flatten().tolist() == [1, 7] * 8
    with torch.no_grad():
        learned.steps.fill_(100.0)
    layer.freeze(learned.codes())
    assert layer.codes[:, 0].tolist() == [1, 7] * 8


def test_other_numbers_than_integers_and_unfrozen_layers_are_refused():
    layer = layer_of(4, weight_format="nf4")
    layer.freeze()
    with pytest.raises(AttarError, match="no integers"):
        LearnedCodes(layer)
    with pytest.raises(AttarError, match="no codes yet"):
        LearnedCodes(layer_of())


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_learned_codes_lower_the_blocks_error_and_change_nothing_else(name):
    settings = dataclasses.replace(GPTQ, gptq_damping=None)
    plain, case = Case(name), Case(name)
    before = plain.quantize(settings)
    after = case.quantize(dataclasses.replace(settings, rounding=LEARNING))
    assert after.error_after < 0.9 * before.error_after
    assert after.error_after == pytest.approx(case.error(), rel=1e-5)
    assert after.rounding.error_after < after.rounding.error_before
    first, second = packed_layers(plain.block.module), packed_layers(case.block.module)
    moved = 0.0
    for layer, other in zip(first.values(), second.values(), strict=True):
        tensors, others = layer.state_dict(), other.state_dict()
        for key in tensors.keys() - {"codes"}:
            assert torch.equal(tensors[key], others[key]), key
        same = (layer.weight - other.weight).abs() / layer.weight_scale
        assert same.max() < 2.001  # neighbours
        moved += (same > 0.5).float().mean().item() / len(first)
    assert 0 < moved < 0.5


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_behind_gptq_they_are_never_worse_on_the_samples(name):
    before = Case(name).quantize(GPTQ).error_after
    after = Case(name).quantize(dataclasses.replace(GPTQ, rounding=LEARNING))
    assert after.error_after <= before and after.rounding.error_after <= after.rounding.error_before


@pytest.mark.slow
def test_a_recipe_with_learned_codes_from_the_pipeline_to_the_checkpoint(tmp_path):
    case = pipelines.CASES["wan"]
    few = {
        "rounding.scale_lr": 1e-3,
        "quantize.weight_format": "full_range",
        "trace.prompts": 2,
        "select.count": 3,
        "allocate.samples": 2,
        "reconstruct.epochs": 1,
        "rounding.epochs": 2,
    }
    generation = {**case.generation, "num_inference_steps": case.steps}
    pipe = attar.compress(
        pipelines.make("wan"), "attar", overrides=few, prompts=pipelines.PROMPTS[:2], generation=generation
    )
    for block in pipe.attar_compression.components["transformer"]["blocks"]:
        assert len(block["rounding_loss"]) == 3 and min(block["rounding_loss"]) > 0
    scales = torch.cat([layer.weight_scale.flatten() for layer in packed_layers(pipe.transformer).values()])
    assert (scales < 0).any() and (scales > 0).any()
    pipe.save_pretrained(tmp_path)
    pipelines.assert_same_model(pipe, DiffusionPipeline.from_pretrained(tmp_path), "wan")


# ------------------------------------------------------------------------------------- scales that move (Genie-M)


@pytest.mark.parametrize("weight_format", ["int", "full_range"])
def test_scales_get_the_gradient_of_their_codes_and_nothing_more(weight_format):
    layer = layer_of(acts=None, group_size=8, weight_format=weight_format)
    layer.freeze()
    learned, x = (
        LearnedCodes(layer, scales=True),
        torch.randn(5, 24, generator=torch.Generator().manual_seed(1)),
    )
    assert torch.equal(learned(x), LearnedCodes(layer)(x))  # at the start
    weighted = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    (learned(x) * weighted).sum().backward()
    scale = layer.baked_weight()[1]
    expected = ((weighted.T @ x) * learned.codes()).unflatten(1, (3, 8)).sum(-1) * scale
    torch.testing.assert_close(learned.log_scale.grad, expected)
    alone = LearnedCodes(layer)
    (alone(x) * weighted).sum().backward()
    assert torch.equal(learned.steps.grad, alone.steps.grad)


def test_learned_scales_reach_the_packed_layer_with_their_signs():
    layer = layer_of(weight_format="full_range")
    layer.freeze()
    learned = LearnedCodes(layer, scales=True)
    with torch.no_grad():
        learned.log_scale.copy_(torch.linspace(-0.1, 0.1, 16)[:, None])
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    before = layer.baked_weight()[1]
    assert torch.equal(learned.scales().sign(), before.sign()) and (before < 0).any()
    packed = layer.bake(learned.codes(), learned.scales())
    torch.testing.assert_close(packed.weight_scale, before * torch.linspace(-0.1, 0.1, 16)[:, None].exp())
    torch.testing.assert_close(packed(x), learned(x))


def test_scales_without_codes_or_of_another_shape_are_refused():
    layer = layer_of()
    for codes, scales in (
        (None, torch.ones(16, 1)),
        (torch.zeros(16, 24, dtype=torch.int8), torch.ones(16, 2)),
    ):
        with pytest.raises(AttarError, match="need codes, and the shape"):
            layer.freeze(codes, scales)


def test_scales_without_a_rate_are_those_of_codes_alone():
    """With the rate 0, and with scales that have a place in the optimizer but no rate."""
    state = {}
    for rate in (0.0, 1e-30):
        case = Case()
        case.quantize(dataclasses.replace(GPTQ, rounding=dataclasses.replace(LEARNING, scale_lr=rate)))
        state[rate] = case.block.module.state_dict()
    assert all(torch.equal(state[0.0][key], state[1e-30][key]) for key in state[0.0])


def test_scales_with_codes_are_better_than_codes_alone_and_these_than_the_nearest():
    """The output's error of one layer at 3 bits, on the calls it is learned from."""
    torch.manual_seed(0)
    mixing = torch.randn(6, 24)  # of independent channels the nearest codes would be the best
    calls = [BlockCall({"x": torch.randn(1, 32, 6) @ mixing}) for _ in range(8)]
    learning, errors = dataclasses.replace(LEARNING, epochs=40, code_lr=5e-3), {}
    for name, rounding in {
        "nearest": None, "codes": learning, "joint": dataclasses.replace(learning, scale_lr=5e-3),
    }.items():  # fmt: skip
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(24, 16)).requires_grad_(False)
        plans = {"0": plan_layers([Linear("0", module[0], "other")], [], Rules(3, 16))[0]}

        def run(call, module=module):
            return {"x": module(call.streams["x"])}

        settings = BlockSettings(
            TransformSettings(scale=False, rotation="none"), weight_clip=False, rounding=rounding
        )
        targets = [run(call) for call in calls]
        outcome = quantize_block(module, plans, run, calls, targets, settings, loss=lambda p, t, c: mse(p, t))
        errors[name] = outcome.error_after
    assert errors["joint"] < 0.9 * errors["codes"] and errors["codes"] < 0.95 * errors["nearest"], errors


def test_rates_of_scales_count_only_where_there_is_one():
    plain = load_recipe("attar-ptq", {"rounding.epochs": 3})
    assert "scale_lr" not in plain.model_dump()["rounding"]
    assert load_recipe("attar-ptq", {"rounding.epochs": 3, "rounding.scale_lr": 1e-3}) != plain
    with pytest.raises(AttarError, match="learned with codes"):
        load_recipe("attar-ptq", {"rounding.scale_lr": 1e-3})


def test_recipes_say_what_they_cannot_learn():
    assert load_recipe("rtn", {"rounding.epochs": 3, "trace": {}, "select": {}}).needs_data
    with pytest.raises(AttarError, match="codes stay"):
        load_recipe("qvgen", {"rounding.epochs": 3})
    for other in (
        {"quantize.weight_format": "nf4"},
        {"quantize.row_bits": {"by": "kurtosis"}, "quantize.weights": 2},
    ):
        with pytest.raises(AttarError, match="learns integers"):
            load_recipe("attar-ptq", {**other, "rounding.epochs": 3})
    rows = {"quantize.row_bits": {"by": "kurtosis"}, "quantize.weight_format": "full_range"}
    assert load_recipe("attar-ptq", {**rows, "quantize.weights": 2}).quantize.row_bits is not None
    assert load_recipe("attar-ptq", {**rows, "rounding.epochs": 3}).needs_data


def test_the_same_seed_gives_the_same_bytes():
    settings, states = dataclasses.replace(GPTQ, rounding=LEARNING), []
    for _ in range(2):
        case = Case()
        case.quantize(settings)
        states.append(case.block.module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
