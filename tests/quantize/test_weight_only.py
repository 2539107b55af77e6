"""Layers with floating-point activations get all of a recipe: transforms, clipping and GPTQ, with or without groups."""

import pytest
import torch
from support import tiny

from attar.calibration.catch import catch_block_calls
from attar.losses import mse, relative_error
from attar.models.adapter import ModelAdapter
from attar.models.block import run_block
from attar.quantize.block import quantize_block
from attar.quantize.block_settings import BlockSettings
from attar.quantize.initialize import TransformSettings
from attar.quantize.plan import Rules, plan_layers
from attar.quantize.reconstruct import ReconstructionSettings
from attar.runtime import use_backend
from attar.runtime.layers import packed_layers

PLAIN = BlockSettings(TransformSettings(scale=False, rotation="none"), weight_clip=False, act_clip=False)
LEARNED = BlockSettings(TransformSettings(), learning=ReconstructionSettings(epochs=3), gptq_damping=0.01)
KINDS = {"channel scale": "channel_scale", "orthogonal": "dense"}


def quantized(name, settings, acts=16, weights=4, group=None, overrides=None, **options):
    """(module, plans, outcome, held-out error) of the first block of a tiny model."""
    make, call = tiny.MODELS[name]
    model = make().requires_grad_(False)
    adapter = ModelAdapter.of(model)
    calls = catch_block_calls(model, adapter, 0, [call(model, seed=i) for i in range(12)])
    block = adapter.blocks[0]
    plans = {
        p.name.removeprefix(f"{block.name}."): p
        for p in plan_layers(
            adapter.linears(block), [], Rules(weights, acts, overrides or {}, group, **options)
        )
        if not p.skipped
    }

    def run(call):
        return run_block(block.module, call, block.outputs)

    with torch.no_grad():
        targets = [run(call) for call in calls]
    outcome = quantize_block(
        block.module, plans, run, calls[:8], targets[:8], settings, loss=lambda p, t, c: mse(p, t)
    )
    with torch.no_grad():
        errors = [
            relative_error(run(c), t, c.streams).item() for c, t in zip(calls[8:], targets[8:], strict=True)
        ]
    return block.module, plans, outcome, sum(errors) / len(errors)


def own_errors(name, layers):
    """Relative error of packed layers of the first block, mean over layers, each on its full-precision inputs in
    held-out calls."""
    make, call = tiny.MODELS[name]
    model = make()
    block, caught = ModelAdapter.of(model).blocks[0].module, {path: [] for path in layers}
    for path, found in caught.items():
        block.get_submodule(path).register_forward_hook(
            lambda m, args, y, found=found: found.append((args[0], y))
        )
    errors = []
    with torch.no_grad():
        for i in range(8, 12):
            model(**call(model, seed=i))
        for path, found in caught.items():
            errors += [((layers[path](x) - y).square().sum() / y.square().sum()).item() for x, y in found]
    return sum(errors) / len(errors)


@pytest.mark.slow(but=["None-wan"])
@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan", "flux"])
@pytest.mark.parametrize("group", [None, 16])
def test_the_recipe_helps_and_integer_activations_cost(name, group):
    _, _, outcome, learned = quantized(name, LEARNED, group=group)
    *_, nearest = quantized(name, PLAIN, group=group)
    *_, with_acts = quantized(name, LEARNED, acts=4)
    # of HunyuanVideo's block much of the error is the modulation's, which no recipe changes
    assert learned < 0.95 * nearest and learned < with_acts
    assert outcome.error_after < outcome.error_before


@pytest.mark.slow(but=["None"])
@pytest.mark.parametrize("group", [None, 16])
def test_gptq_and_learning_each_lower_the_error(group):
    parts = {
        "scale and rotation": BlockSettings(TransformSettings()),
        "gptq": BlockSettings(TransformSettings(), gptq_damping=0.01),
        "learning": BlockSettings(TransformSettings(), learning=ReconstructionSettings(epochs=3)),
        "both": LEARNED,
    }
    errors = {
        part: quantized("wan", settings, weights=3, group=group)[-1] for part, settings in parts.items()
    }
    assert errors["gptq"] < errors["scale and rotation"] and errors["both"] < errors["learning"]
    assert errors["learning"] < errors["scale and rotation"]


@pytest.mark.parametrize("rotation", ["none", "hadamard", "kronecker", "orthogonal"])
@pytest.mark.parametrize("order", ["scale_then_rotate", "rotate_then_scale"])
@pytest.mark.parametrize("group", [None, 16])
def test_layers_are_what_the_treatment_says_on_every_backend(rotation, order, group):
    settings = BlockSettings(TransformSettings(rotation=rotation, order=order), gptq_damping=0.01)
    module, plans, outcome, _ = quantized("wan", settings, group=group)
    assert packed_layers(module) == outcome.layers
    for name, layer in outcome.layers.items():
        treatment = settings.treatment(plans[name])
        assert treatment[-2:] == ["weight clipping", "gptq"]
        assert [t.kind for t in layer.transforms] == [KINDS.get(step, step) for step in treatment[:-2]]
        assert layer.act_bits is None and layer.act_clip is None and layer.group_size == group
        x = torch.randn(5, layer.in_features)
        with torch.no_grad():
            outputs = []
            for backend in ("reference", "cpu"):
                with use_backend(backend):
                    outputs.append(layer(x))
            torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
            original = x @ layer.weight.T + (0 if layer.bias is None else layer.bias)  # in the original basis
            torch.testing.assert_close(outputs[0], original, rtol=1e-3, atol=1e-4)


def test_only_modulation_stays_plain():
    _, plans, outcome, _ = quantized("hunyuan", LEARNED)
    plain = {name for name, plan in plans.items() if plan.plain}
    assert plain == {name for name, plan in plans.items() if plan.role == "modulation"} != set()
    for name, layer in outcome.layers.items():
        assert (len(layer.transforms) == 0) == (name in plain)
        assert LEARNED.treatment(plans[name])[-1] == ("nearest" if name in plain else "gptq")


@pytest.mark.slow(but=["True-dit", "False-cogvideox"])
@pytest.mark.parametrize("name", ["hunyuan", "cogvideox", "dit", "flux"])
@pytest.mark.parametrize("learned", [False, True])
def test_calibrated_modulation_errs_less_and_is_as_large(name, learned):
    settings = BlockSettings(
        TransformSettings(shift=True), clip_search=True, gptq_damping=0.01, gptq_whole=True, round_weights=False,
        learning=ReconstructionSettings(epochs=3) if learned else None,
    )  # fmt: skip
    errors, own, sizes = [], [], []
    for calibrated in (False, True):
        _, plans, outcome, error = quantized(name, settings, acts=8, calibrate_modulation=calibrated)
        modulation = {n: layer for n, layer in outcome.layers.items() if plans[n].role == "modulation"}
        assert modulation
        for path, layer in modulation.items():
            assert len(layer.transforms) == 0  # what the shift is for is in the bias
            steps = ["channel shift", "searched weight clipping", "gptq"] if calibrated else ["nearest"]
            assert settings.treatment(plans[path]) == steps
        errors.append(error)
        own.append(own_errors(name, modulation))
        sizes.append(sum(b.numel() for layer in modulation.values() for b in layer.buffers()))
    assert own[1] < 0.95 * own[0] and sizes[0] == sizes[1]
    if not learned:  # what else a tiny model learns depends on the processor's roundings, by more than this
        assert errors[1] < 0.95 * errors[0]


def test_an_override_of_the_activations_keeps_the_treatment():
    _, plans, outcome, _ = quantized("wan", LEARNED, acts=6, overrides={"cross_attn.*": {"acts": 16}})
    found = {plans[name].act_bits for name in outcome.layers}
    assert found == {6, None}
    assert all(len(layer.transforms) == 2 for layer in outcome.layers.values())


def test_clipping_starts_where_it_is_told_to():
    steps = {}
    for start in (4.0, 0.0):
        settings = BlockSettings(TransformSettings(scale=False, rotation="none"), clip_start=start)
        steps[start] = quantized("wan", settings)[2].layers["attn1.to_q"].weight_scale
    ratio = torch.sigmoid(torch.tensor(0.0)) / torch.sigmoid(torch.tensor(4.0))
    torch.testing.assert_close(steps[0.0], steps[4.0] * ratio)


def test_a_moving_average_of_statistics_gives_other_scales():
    scales = {}
    for ema in (None, 0.95):
        settings = BlockSettings(TransformSettings(rotation="none"), stats_ema=ema)
        scales[ema] = next(iter(quantized("wan", settings)[2].layers["ffn.net.2"].transforms)).scale
    assert (scales[0.95] <= scales[None] * 1.0001).all() and not torch.allclose(scales[0.95], scales[None])
