"""Codes that are learned by the block's error, at scales that stay."""

import dataclasses

import pytest
import torch
from diffusers import DiffusionPipeline
from support import pipelines
from support.block_case import Case
from torch import nn

import attar
from attar.errors import AttarError
from attar.quantize.block import BlockSettings
from attar.quantize.initialize import TransformSettings
from attar.quantize.learned_codes import LearnedCodes
from attar.quantize.linear import QuantizedLinear
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


def test_a_recipe_with_learned_codes_from_the_pipeline_to_the_checkpoint(tmp_path):
    case = pipelines.CASES["wan"]
    few = {
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
