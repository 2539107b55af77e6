import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.errors import AttarError
from attar.quantize.linear import QuantizedLinear
from attar.quantize.rounding import HessianAccumulator, collect_hessians, gptq, nearest
from attar.quantize.transforms import LearnedKronecker, LearnedScale
from attar.runtime.reference import symmetric_scale


def correlated(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator) / d**0.5 + 0.5
    return torch.randn(n, d, generator=generator) @ mix


def row_scale(weight, bits):
    return symmetric_scale(weight.abs().amax(1, keepdim=True) * 0.9, bits)


def hessian_of(x):
    accumulator = HessianAccumulator(x.shape[-1], dtype=torch.float64)
    accumulator.update(x)
    return accumulator.hessian


def output_error(codes, scale, weight, x):
    return (x @ (codes.float() * scale - weight).T).square().mean().item()


def test_running_mean_does_not_depend_on_the_split():
    x = correlated(100, 12)
    whole = 2 * x.T.double() @ x.double() / 100
    accumulator = HessianAccumulator(12, dtype=torch.float64)
    for part in (x[:1], x[1:40].reshape(3, 13, 12), x[40:40], x[40:]):
        accumulator.update(part)
    assert accumulator.tokens == 100
    assert torch.allclose(accumulator.hessian, whole)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10_000), st.sampled_from([1, 3, 5, 128]))
def test_an_identity_hessian_gives_nearest_rounding(bits, seed, block):
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))
    scale = row_scale(weight, bits)
    assert torch.equal(gptq(weight, torch.eye(10), scale, bits, block=block), nearest(weight, scale, bits))


def explicit_obq(weight, hessian, scale, bits, damping):
    """Optimal brain quantizer with the inverse of each remaining sub-Hessian, column after column."""
    d = weight.shape[1]
    h = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(d, dtype=torch.float64)
    w, codes = weight.double().clone(), torch.zeros_like(weight)
    for i in range(d):
        inverse = torch.linalg.inv(h[i:, i:])
        codes[:, i] = (w[:, i] / scale[:, 0]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = (w[:, i] - codes[:, i] * scale[:, 0]) / inverse[0, 0]
        w[:, i:] -= torch.outer(error, inverse[0])
    return codes.to(torch.int8)


@pytest.mark.parametrize("block", [1, 4, 128])
def test_gptq_equals_the_explicit_optimal_brain_quantizer(block):
    torch.manual_seed(0)
    weight, x = torch.randn(16, 24).double(), correlated(200, 24).double()
    scale = row_scale(weight, 3)
    found = gptq(weight, hessian_of(x), scale, 3, block=block)
    assert torch.equal(found, explicit_obq(weight, hessian_of(x), scale, 3, 0.01))


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_lowers_the_output_error_on_held_out_inputs(bits):
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), correlated(700, 64)
    scale = row_scale(weight, bits)
    codes = gptq(weight, hessian_of(x[:500]), scale, bits)
    rounded = nearest(weight, scale, bits)
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
    assert output_error(codes, scale, weight, x[500:]) < 0.8 * output_error(rounded, scale, weight, x[500:])


def test_groups_keep_their_own_scales():
    torch.manual_seed(0)
    weight, x = torch.randn(8, 32) * torch.linspace(0.1, 3, 32), correlated(300, 32)
    scale = symmetric_scale(weight.unflatten(1, (4, 8)).abs().amax(-1), 4)
    columns = scale.repeat_interleave(8, 1)
    assert torch.equal(nearest(weight, scale, 4), (weight / columns).round().to(torch.int8))
    codes = gptq(weight, hessian_of(x), scale, 4)
    better = output_error(codes, columns, weight, x)
    assert better < output_error(nearest(weight, scale, 4), columns, weight, x)


def test_inputs_that_were_never_active_do_not_disturb():
    torch.manual_seed(0)
    weight, x = torch.randn(6, 16), correlated(100, 16)
    x[:, [2, 9]] = 0
    scale = row_scale(weight, 4)
    codes = gptq(weight, hessian_of(x), scale, 4)
    assert torch.equal(codes[:, [2, 9]], nearest(weight, scale, 4)[:, [2, 9]])


def test_a_rank_deficient_hessian_is_damped_and_a_broken_one_refused():
    torch.manual_seed(0)
    weight, x = torch.randn(6, 64), correlated(4, 64) * 1e3
    scale = row_scale(weight, 4)
    codes = gptq(weight, hessian_of(x).float(), scale, 4, damping=1e-9)
    assert output_error(codes, scale, weight, x) < output_error(nearest(weight, scale, 4), scale, weight, x)
    with pytest.raises(AttarError, match="not finite"):
        gptq(weight, torch.full((64, 64), float("nan")), scale, 4)
    with pytest.raises(AttarError, match="indefinite"):
        gptq(weight, -torch.eye(64), scale, 4)
    with pytest.raises(AttarError, match="does not fit"):
        gptq(weight, torch.eye(63), scale, 4)
    with pytest.raises(AttarError, match="do not fit"):
        nearest(weight, scale[:3], 4)


def test_collected_hessians_see_transformed_inputs():
    torch.manual_seed(0)
    transforms = [LearnedScale(torch.rand(16) + 0.5), LearnedKronecker(16)]
    model = nn.Sequential(QuantizedLinear(nn.Linear(16, 16), 4, 4, transforms), nn.GELU())
    calls = [torch.randn(2, 5, 16), torch.randn(1, 3, 16)]
    found = collect_hessians(model, calls, {"0": model[0]})["0"]
    x = torch.cat([model[0].transform_input(c).reshape(-1, 16) for c in calls])
    assert torch.allclose(found, 2 * x.T @ x / 13, atol=1e-5)
    assert not model[0]._forward_pre_hooks
    with pytest.raises(AttarError, match="not reached"):
        collect_hessians(model, [], {"0": model[0]})


def test_gptq_beats_nearest_in_a_packed_layer():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), correlated(600, 64)
    layer = QuantizedLinear(linear, 4, 8, [LearnedScale(torch.rand(64) + 0.5)])
    hessian = collect_hessians(layer, [x[:400]], {"": layer})[""]
    with torch.no_grad():
        y = linear(x[400:])
        rounded = (layer.bake()(x[400:]) - y).square().mean()
        layer.unfreeze()
        compensated = layer.bake(gptq(*_arguments(layer, hessian)))
        assert (compensated(x[400:]) - y).square().mean() < 0.8 * rounded


def _arguments(layer, hessian):
    weight, scale = layer.baked_weight(clipped=True)
    return weight, hessian, scale, layer.weight_bits
