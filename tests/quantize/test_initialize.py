import pytest
import torch
from torch import nn

import attar.quantize.adaptive
from attar.errors import AttarError
from attar.quantize.adaptive import collect_input_samples
from attar.quantize.initialize import (
    TransformSettings,
    build_rotation,
    build_transforms,
    collect_input_stats,
)
from attar.quantize.linear import QuantizedLinear, set_quantizers
from attar.quantize.transforms import LearnedKronecker, LearnedScale


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))


@pytest.fixture
def calls():
    torch.manual_seed(1)
    return [torch.randn(2, 5, 16), torch.randn(1, 9, 16) * 3]


def test_maximum_over_all_tokens_of_all_calls(model, calls):
    stats = collect_input_stats(model, calls, {"0": model[0], "2": model[2]})
    assert torch.equal(stats["0"], torch.cat([c.reshape(-1, 16) for c in calls]).abs().amax(0))
    assert stats["2"].shape == (24,)
    assert not model[0]._forward_pre_hooks


def test_moving_average_over_samples(model, calls):
    stats = collect_input_stats(model, calls, {"0": model[0]}, ema=0.95)
    first, second = calls[0].abs().amax(1).mean(0), calls[1].abs().amax(1).mean(0)
    assert torch.allclose(stats["0"], 0.95 * first + 0.05 * second)


def test_a_layer_that_is_called_twice_in_a_call_counts_once(model, calls):
    twice = collect_input_stats(lambda c: (model(c), model(c)), calls, {"0": model[0]}, ema=0.95)
    assert torch.equal(twice["0"], collect_input_stats(model, calls, {"0": model[0]}, ema=0.95)["0"])


def test_a_layer_that_is_never_called_is_an_error_and_leaves_no_hooks(model, calls):
    with pytest.raises(AttarError, match="not reached"):
        collect_input_stats(model[:1], calls, {"2": model[2]})
    assert not model[2]._forward_pre_hooks


@pytest.mark.parametrize("rotation", ["none", "hadamard", "kronecker", "orthogonal"])
@pytest.mark.parametrize("order", ["scale_then_rotate", "rotate_then_scale"])
@pytest.mark.parametrize("scale", [True, False])
def test_every_combination_is_an_equivalent_layer(model, calls, rotation, order, scale):
    settings = TransformSettings(scale=scale, rotation=rotation, order=order)
    linear, rotations = model[0], {}
    if order == "rotate_then_scale" and rotation != "none":
        rotations = {"0": build_rotation(16, settings, torch.Generator().manual_seed(0))}
    stats = collect_input_stats(model, calls, {"0": linear}, rotations=rotations)["0"]
    transforms = build_transforms(linear, stats, settings, rotation=rotations.get("0"))
    assert len(transforms) == scale + (rotation != "none")
    if scale:
        position = -1 if order == "rotate_then_scale" else 0
        assert isinstance(transforms[position], LearnedScale)
    layer = QuantizedLinear(linear, 4, 4, transforms)
    set_quantizers([layer], weights=False, acts=False)
    with torch.no_grad():
        assert torch.allclose(layer(calls[0]), linear(calls[0]), atol=1e-4)


def test_the_scale_behind_a_rotation_balances_the_rotated_channels(model, calls):
    settings = TransformSettings(order="rotate_then_scale")
    rotation = build_rotation(16, settings, torch.Generator().manual_seed(0))
    stats = collect_input_stats(model, calls, {"0": model[0]}, rotations={"0": rotation})["0"]
    _, scale = build_transforms(model[0], stats, settings, rotation=rotation)
    rotated_weight = rotation.weight_side(model[0].weight, rotation.matrices())
    c = scale.matrices()[0]
    assert torch.allclose(stats / c, rotated_weight.abs().amax(0) * c, rtol=1e-4)
    with pytest.raises(AttarError, match="behind a rotation"):
        build_transforms(model[0], stats, settings)


@pytest.mark.parametrize("order", ["scale_then_rotate", "rotate_then_scale"])
@pytest.mark.parametrize("threshold", [0.0, 1e9])
def test_adaptive_rotations_are_equivalent_and_see_the_input_as_it_comes_to_them(
    model, calls, order, threshold, monkeypatch
):
    settings = TransformSettings(rotation="adaptive", order=order, rotation_threshold=threshold)
    sample = collect_input_samples(model, calls, {"0": model[0]})["0"]
    assert torch.equal(sample.rows, calls[0].reshape(-1, 16)) and sample.rows.shape[1] == 16
    generator = torch.Generator().manual_seed(0)
    rotation = build_rotation(16, settings, generator, sample) if order == "rotate_then_scale" else None
    stats = collect_input_stats(
        model, calls, {"0": model[0]}, rotations=None if rotation is None else {"0": rotation}
    )["0"]
    seen = []
    found = attar.quantize.adaptive.dual_rotation
    monkeypatch.setattr(
        "attar.quantize.adaptive.dual_rotation", lambda rows, **o: seen.append(rows) or found(rows, **o)
    )
    transforms = build_transforms(model[0], stats, settings, generator, rotation, sample)
    if threshold == 0 and order == "scale_then_rotate":
        torch.testing.assert_close(seen[0], transforms[0](sample.rows, transforms[0].matrices()))
    layer = QuantizedLinear(model[0], 4, 4, transforms)
    set_quantizers([layer], weights=False, acts=False)
    with torch.no_grad():
        assert torch.allclose(layer(calls[0]), model[0](calls[0]), atol=1e-4)
    with pytest.raises(AttarError, match="needs calibration"):
        build_rotation(16, settings)
    with pytest.raises(AttarError, match="not reached"):
        collect_input_samples(model[:1], calls, {"2": model[2]})


def test_settings_are_checked(model):
    for bad in ({"rotation": "givens"}, {"order": "both"}, {"alpha": 1.5}):
        with pytest.raises(AttarError):
            TransformSettings(**bad)
    with pytest.raises(AttarError, match="input statistics"):
        build_transforms(model[0], None, TransformSettings())
    affine = build_transforms(model[0], torch.ones(16), TransformSettings(affine=True, scale=False))
    assert isinstance(affine[0], LearnedKronecker) and affine[0].affine
