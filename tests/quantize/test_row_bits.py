"""Bits by rows: MPQ-DM's proof list (kurtosis, budget, search, order), and the optimum."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.errors import AttarError
from attar.quantize.linear import QuantizedLinear
from attar.quantize.rounding import gptq, gptq_codes
from attar.quantize.row_bits import (
    HIGH,
    LOW,
    SAME,
    RowBitsSettings,
    best_rows,
    kurtosis,
    mix_rows,
    row_errors,
    searched_rows,
)
from attar.quantize.weights import Grid

OUT, IN = 40, 256


def heavy(share=0.3, seed=0, out=OUT, width=IN):
    """Gaussian rows, and a share of rows of Student's t with 3 degrees of freedom, all of variance 1."""
    torch.manual_seed(seed)
    weight = torch.randn(out, width)
    count = round(out * share)
    tails = torch.distributions.StudentT(3.0).sample((count, width))
    weight[:count] = tails / tails.std(1, keepdim=True)
    return weight[torch.randperm(out)]


def layer_of(weight, bits=4, act_bits=6, **options):
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight.clone()
    options.setdefault("weight_clip", False)
    return QuantizedLinear(linear, bits, act_bits, act_clip=False, **options)


def error(layer, weight):
    return (layer.rounded(weight) - weight).square().sum().item()


def test_kurtosis_of_known_distributions():
    torch.manual_seed(0)
    n = 100_000
    rows = torch.stack([torch.randn(n), torch.rand(n), torch.distributions.Laplace(0.0, 1.0).sample((n,))])
    assert kurtosis(rows).tolist() == pytest.approx([3, 1.8, 6], rel=0.05)
    assert torch.allclose(
        kurtosis(rows * torch.tensor([[3.0], [-2.0], [0.01]]) + 5), kurtosis(rows), rtol=1e-3
    )
    assert kurtosis(torch.ones(2, 5)).tolist() == [0, 0]


@pytest.mark.parametrize("by", ["kurtosis", "error", "random"])
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_mean_bits_stay_exactly_and_bytes_with_them(by, bits):
    weight = heavy()
    layer, uniform = layer_of(weight, bits), layer_of(weight, bits)
    chosen = mix_rows(layer, RowBitsSettings(by, "weight"), generator=torch.Generator().manual_seed(0))
    assert (chosen == HIGH).sum() == (chosen == LOW).sum()
    assert set(chosen.tolist()) <= {LOW, SAME, HIGH}
    packed = layer.bake()
    assert packed.codes.numel() == uniform.bake().codes.numel()
    assert layer.weight_bits == bits


@pytest.mark.parametrize("metric", ["weight", "output"])
@pytest.mark.parametrize("by", ["kurtosis", "error"])
def test_never_worse_than_uniform_and_error_is_best(metric, by):
    weight = heavy(0.2)
    x = torch.randn(400, IN) * torch.linspace(0.1, 3, IN)
    moment = x.T @ x / len(x) if metric == "output" else None

    def loss(layer):
        return row_errors(layer.rounded(weight) - weight, moment).sum().item()

    uniform, layer, best = layer_of(weight), layer_of(weight), layer_of(weight)
    mix_rows(layer, RowBitsSettings(by, metric), moment)
    mix_rows(best, RowBitsSettings("error", metric), moment)
    assert loss(best) <= loss(layer) <= loss(uniform) and loss(best) < 0.97 * loss(uniform)
    if metric == "output":  # the form is the layer's squared output error, mean over the inputs
        difference = layer.rounded(weight) - weight
        assert loss(layer) == pytest.approx((x @ difference.T).square().sum().item() / len(x), rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0.01, 10)] * 3), min_size=1, max_size=7))
def test_best_rows_is_the_optimum_where_each_bit_gains_less_than_the_one_before(table):
    # convex in the bits: sorted gains
    errors = torch.tensor(table, dtype=torch.float64).T
    gains = errors[:2].sort(0, descending=True).values
    errors = torch.stack([gains.sum(0), gains[1], torch.zeros_like(gains[0])])
    chosen = best_rows(errors)
    assert chosen.sum() == len(table) and chosen.max() <= 2
    found = errors.gather(0, chosen[None]).sum().item()
    every = [p for p in itertools.product(range(3), repeat=len(table)) if sum(p) == len(table)]
    optimum = min(sum(errors[g, r].item() for r, g in enumerate(p)) for p in every)
    assert found == pytest.approx(optimum)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0.01, 10)] * 3), min_size=1, max_size=9))
def test_best_rows_keeps_the_mean_whatever_the_errors(table):
    chosen = best_rows(torch.tensor(table).T)
    assert chosen.sum() == len(table) and chosen.min() >= 0 and chosen.max() <= 2


def test_search_takes_the_best_of_all_counts():
    torch.manual_seed(1)
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        errors, salience = torch.rand(3, 30, generator=g), torch.rand(30, generator=g)
        chosen = searched_rows(errors, salience, 0.1, 0.5)
        falling = salience.argsort(descending=True)
        tried = []
        for k in range(0, 16, 3):
            grid = torch.full((30,), SAME)
            grid[falling[:k]], grid[falling[30 - k :]] = HIGH, LOW
            tried.append(errors.gather(0, grid[None]).sum().item())
        assert errors.gather(0, chosen[None]).sum().item() == pytest.approx(min(tried))
        k = int((chosen == HIGH).sum())
        assert set(falling[:k].tolist()) == set((chosen == HIGH).nonzero()[:, 0].tolist())
    assert (
        searched_rows(torch.rand(3, 5), torch.rand(5), 0.1, 0.5) == SAME
    ).all()  # fewer rows than one step


def test_rows_of_heavy_tails_get_the_bits_and_order_matters():
    for seed in range(3):
        weight = heavy(0.3, seed, width=1024)  # the longer the rows, the farther their tails reach
        salience, g = kurtosis(weight), torch.Generator().manual_seed(seed)
        grids = RowBitsSettings().grids(4, "int")
        losses = {}
        for name, key in {
            "kurtosis": salience,
            "random": torch.rand(OUT, generator=g).double(),
            "inverted": -salience,
        }.items():
            grid = torch.full((OUT,), SAME)
            falling = key.argsort(descending=True)
            grid[falling[:4]], grid[falling[-4:]] = HIGH, LOW
            layer = layer_of(weight)
            layer.mix_rows(grids, grid)
            losses[name] = error(layer, weight)
        losses["none"] = error(layer_of(weight), weight)
        assert losses["kurtosis"] < losses["random"] < losses["inverted"]
        assert losses["kurtosis"] < losses["none"]


@pytest.mark.parametrize("salient", ["int", "residual"])
def test_one_quantizer_of_levels_equals_the_sum_of_three_masked_ones(salient):
    weight = heavy()
    layer = layer_of(weight, 4)
    settings_ = RowBitsSettings("error", "weight", salient_format=salient)
    chosen = mix_rows(layer, settings_)
    total = torch.zeros_like(weight)
    for i, grid in enumerate(settings_.grids(4, "int")):
        alone = layer_of(weight, grid.bits, weight_format=grid.weight_format)
        total += alone.rounded(weight) * (chosen == i)[:, None]
    assert torch.equal(layer.rounded(weight), total)
    x = torch.randn(7, IN)
    layer.freeze()
    torch.testing.assert_close(layer.bake()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_clipping_of_all_rows_and_the_tables():
    layer = layer_of(heavy(), 4, weight_clip=True)
    mix_rows(layer, RowBitsSettings("error", "weight"))
    layer(torch.randn(9, IN)).square().sum().backward()
    assert (layer.quantizer.clip_logit.grad != 0).float().mean() > 0.9
    rows = heavy() * torch.logspace(-1, 1, OUT)[:, None]  # so that bits are worth moving
    table = layer_of(rows, 4, weight_format="lloyd", train_levels=True)
    mix_rows(table, RowBitsSettings("error", "weight"))
    assert len(table.level_parameters()) == 3
    table(torch.randn(9, IN)).square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in table.level_parameters())


def test_gptq_of_each_kind_is_gptq_alone():
    weight = heavy()
    layer = layer_of(weight, weight_clip=True)
    chosen = mix_rows(layer, RowBitsSettings("error", "weight"))
    x = torch.randn(500, IN)
    hessian = 2 * x.T @ x / len(x)
    codes = gptq_codes(layer, hessian, 0.01, 128)
    clipped, scale = layer.baked_weight(clipped=True)
    for i, grid in enumerate(RowBitsSettings().grids(4, "int")):
        own = chosen == i
        assert torch.equal(codes[own], gptq(clipped[own], hessian, scale[own], grid.bits))
    layer.freeze(codes)
    rounded = layer_of(weight, weight_clip=True)
    rounded.freeze()
    y = x @ weight.T
    assert (layer.bake()(x) - y).square().mean() < (rounded.bake()(x) - y).square().mean()


def test_prescaling_tames_a_planted_outlier_channel():
    """Equivalence with quantizers off to 1e-5, and less than half of the error of four-bit activations."""
    from attar.quantize.transforms import LearnedScale

    torch.manual_seed(0)
    weight, x = torch.randn(OUT, IN), torch.randn(64, IN)
    x[:, 3] *= 30
    start = (x.abs().amax(0) / weight.abs().amax(0)).sqrt()
    layers = {
        "scaled": layer_of(weight, 4, 4, transforms=[LearnedScale(start)]),
        "plain": layer_of(weight, 4, 4),
    }
    exact = x @ weight.T
    losses = {}
    for name, layer in layers.items():
        layer.bias = None
        layer.weight_quant = layer.act_quant = False
        torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=1e-3)
        layer.act_quant = True
        losses[name] = (layer(x) - exact).square().mean().item()
    assert losses["scaled"] < losses["plain"] / 2


def test_clipping_is_searched_for_the_bits_of_each_row():
    weight = heavy() * torch.logspace(-0.5, 0.5, OUT)[:, None]
    layer = layer_of(weight, 3, weight_clip=True)
    chosen = mix_rows(layer, RowBitsSettings("error", "weight"), search_clip=True)
    layer.search_clip()
    assert set(chosen.tolist()) == {LOW, SAME, HIGH}
    for row in range(OUT):
        alone = layer_of(weight[row : row + 1], 2 + int(chosen[row]), weight_clip=True)
        alone.search_clip()
        assert torch.equal(alone.quantizer.clip_logit[:, 0], layer.quantizer.clip_logit[:, row])


def test_refusals():
    layer = layer_of(heavy())
    with pytest.raises(AttarError, match="calibration inputs"):
        mix_rows(layer, RowBitsSettings("error", "output"))
    with pytest.raises(AttarError, match="would have 9"):
        RowBitsSettings().grids(8, "int")
    for name, bits in (("nf4", 4), ("fp8", 8)):
        with pytest.raises(AttarError):
            RowBitsSettings().grids(bits, name)
    assert RowBitsSettings().grids(2, "int")[LOW] == Grid(1, "binary")
    grouped = layer_of(heavy(), 4, None, group_size=64)
    with pytest.raises(AttarError, match="one scale"):
        grouped.mix_rows(RowBitsSettings().grids(4, "int"), torch.ones(OUT))
