"""One block from full precision to packed layers."""

import pytest
import torch
from support.block_case import Case
from torch import nn

from attar.errors import AttarError
from attar.quantize.block_settings import BlockSettings
from attar.quantize.initialize import TransformSettings
from attar.quantize.reconstruct import ReconstructionSettings
from attar.runtime.layers import PackedLinear, packed_layers

PLAIN = BlockSettings(TransformSettings(scale=False, rotation="none"), weight_clip=False, act_clip=False)
LEARNED = BlockSettings(TransformSettings(), learning=ReconstructionSettings(epochs=2), gptq_damping=0.01)


def test_rounding_to_nearest_needs_no_data():
    case = Case()
    weights = {name: case.block.module.get_submodule(name).weight.clone() for name in case.plans}
    outcome = case.quantize(PLAIN, data=False)
    assert outcome.error_before is outcome.error_after is outcome.learning is None
    assert outcome.layers == packed_layers(case.block.module) and outcome.layers.keys() == case.plans.keys()
    for name, weight in weights.items():
        step = outcome.layers[name].weight_scale
        assert ((outcome.layers[name].weight - weight).abs() <= 0.5001 * step).all()
    with_data = Case().quantize(PLAIN)
    assert (
        with_data.error_before == pytest.approx(with_data.error_after, rel=1e-4)
        and with_data.error_before > 0
    )


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan"])
def test_learning_rounding_and_packing(name):
    case = Case(name)
    seen = []
    outcome = case.quantize(LEARNED, progress=lambda *a: seen.append(a[0]))
    assert 0 < outcome.error_after < outcome.error_before
    assert outcome.error_after == pytest.approx(case.error(), rel=1e-5)
    assert len(outcome.learning.history) == 2 and set(seen) == {1, 2}
    assert all(isinstance(layer, PackedLinear) for layer in outcome.layers.values())
    left = [n for n, m in case.block.module.named_modules() if isinstance(m, nn.Linear)]
    assert set(left) == set(outcome.layers)
    for layer_name, layer in outcome.layers.items():
        weight_only = case.plans[layer_name].act_bits is None
        assert (layer.act_clip is None) == weight_only and (len(layer.transforms) == 0) == weight_only
        assert weight_only == (case.plans[layer_name].role == "modulation")


def test_shifts_are_the_means_of_the_inputs_and_lower_the_error():
    """The case's inputs get a constant that their layers see, as modulation gives it."""
    errors = []
    for shift in (False, True):
        case = Case(offset=2.0)
        transforms = TransformSettings(rotation="hadamard", shift=shift)
        outcome = case.quantize(BlockSettings(transforms, gptq_damping=0.01))
        errors.append(outcome.error_after)
        assert outcome.error_after == pytest.approx(case.error(), rel=1e-5)
        kinds = {tuple(t.kind for t in layer.transforms) for layer in outcome.layers.values()}
        start = ("channel_shift",) if shift else ()
        assert {kind[:1] for kind in kinds if kind} == ({start} if shift else {("channel_scale",)})
    assert errors[1] < 0.9 * errors[0]
    with pytest.raises(AttarError, match="shifts need calibration"):
        Case().quantize(
            BlockSettings(TransformSettings(scale=False, rotation="none", shift=True)), data=False
        )


def test_the_same_seed_gives_the_same_bytes():
    states = []
    for seed in ("0", "0", "1"):
        case = Case()
        case.quantize(LEARNED, seed=seed)
        states.append(case.block.module.state_dict())
    first, second, other = states
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_gptq_lowers_the_error():
    errors = {}
    for damping in (None, 0.01):
        case = Case()
        settings = BlockSettings(TransformSettings(rotation="none"), gptq_damping=damping, gptq_block=16)
        errors[damping] = case.quantize(settings).error_after
    assert errors[0.01] < errors[None]


@pytest.mark.parametrize(
    ("switch", "kinds"),
    [("train_scale", {"LearnedScale"}), ("train_rotation", {"LearnedKronecker"}), ("train_clip", {"clip"})],
)
def test_each_group_can_be_left_out_of_training(switch, kinds, monkeypatch):
    import attar.quantize.block as block_module

    groups = {}
    original = block_module.reconstruct_block

    def spy(run, calls, targets, parameters, *args, **kwargs):
        groups.update({name: len(list(values)) for name, values in parameters.items()})
        return original(run, calls, targets, parameters, *args, **kwargs)

    monkeypatch.setattr(block_module, "reconstruct_block", spy)
    learning = ReconstructionSettings(epochs=1)
    Case().quantize(BlockSettings(TransformSettings(), learning=learning))
    everything = dict(groups)
    Case().quantize(BlockSettings(TransformSettings(), learning=learning, **{switch: False}))
    if kinds == {"clip"}:
        assert groups["clip"] == 0 and groups["transform"] == everything["transform"]
    else:
        assert groups["clip"] == everything["clip"] and 0 < groups["transform"] < everything["transform"]


@pytest.mark.parametrize("order", ["scale_then_rotate", "rotate_then_scale"])
def test_the_order_of_transforms(order):
    case = Case()
    outcome = case.quantize(BlockSettings(TransformSettings(order=order)))
    kinds = [[t.kind for t in layer.transforms] for layer in outcome.layers.values()]
    expected = (
        ["channel_scale", "kronecker"] if order == "scale_then_rotate" else ["kronecker", "channel_scale"]
    )
    assert all(found == expected for found in kinds)


def test_what_cannot_be_done():
    with pytest.raises(AttarError, match="need calibration samples"):
        Case().quantize(BlockSettings(TransformSettings()), data=False)
    with pytest.raises(AttarError, match="no calibration calls"):
        settings = BlockSettings(TransformSettings(scale=False), learning=ReconstructionSettings(epochs=1))
        Case().quantize(settings, data=False)
    with pytest.raises(AttarError, match=r"needs calibration|no calibration|not reached|samples"):
        Case().quantize(BlockSettings(TransformSettings(scale=False), gptq_damping=0.01), data=False)
    with pytest.raises(AttarError, match="adaptive rotations need"):
        Case().quantize(BlockSettings(TransformSettings(scale=False, rotation="adaptive")), data=False)
    case = Case()
    case.block.module.ffn.net[2].weight.data[0, 0] = torch.nan
    with pytest.raises(AttarError, match=r"not finite \[blocks\.0\.ffn\.net\.2\]"):
        case.quantize(PLAIN)


def test_layers_that_are_kept():
    case = Case()
    kept = {name: case.plans.pop(name) for name in list(case.plans) if name.startswith("ffn")}
    case.quantize(PLAIN)
    assert all(type(case.block.module.get_submodule(name)) is nn.Linear for name in kept)
    assert packed_layers(case.block.module).keys() == case.plans.keys()
