"""Tables that each row or group has to itself: binary planes, residual grids, free levels; and training them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.errors import AttarError
from attar.quantize.formats import fake_quantize_weight, quantize_weight, weight_steps
from attar.quantize.linear import QuantizedLinear
from attar.quantize.rounding import gptq
from attar.quantize.row_tables import (
    SHRINK,
    as_table,
    binary_start,
    dual_levels,
    dual_plain,
    residual_levels,
    residual_start,
)
from attar.quantize.sorted_rows import SortedRows
from attar.quantize.tables import TABLES, fit_levels, fit_parameters, levels_for, power_levels
from attar.quantize.transforms import LearnedKronecker
from attar.runtime.formats import check_levels, decode, encode
from attar.runtime.packing import pack, unpack

PER_ROW = [(name, bits) for name, table in TABLES.items() if table.per_row for bits in table.bits]
# An absolute one searches what its rows share (twin_log its offset); lloyd starts from such tables too.
SHARING = {name: table.bits for name, table in TABLES.items() if table.absolute}
SHARING["lloyd"] = tuple({bits for some in SHARING.values() for bits in some})
APART = [kind for kind in PER_ROW if kind[1] not in SHARING.get(kind[0], ())]
TRAINED = [(name, min(table.bits[-1], 3)) for name, table in TABLES.items() if table.levels is not None]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(rows, n, seed=0):
    """Student-t with three degrees of freedom."""
    torch.manual_seed(seed)
    return torch.distributions.StudentT(3.0).sample((rows, n))


def steps_of(weight):
    return weight_steps(weight, None)


def rounded(steps, levels):
    bits = levels.shape[-1].bit_length() - 1
    return decode(encode(steps, "table", bits, levels), "table", bits, levels)


def errors(steps, levels):
    """Mean squared error of each row."""
    return (steps - rounded(steps, levels)).square().mean((-1, -2))


def affine_error(weight, bits):
    """Squared error of each row rounded to the best of the shrunk affine grids."""
    found = []
    smallest, largest = weight.aminmax(dim=1, keepdim=True)
    for share in SHRINK:
        low, high = smallest.clamp(max=0) * share, largest.clamp(min=0) * share
        step = (high - low) / (2**bits - 1)
        zero = (-low / step).round()
        codes = ((weight / step).round() + zero).clamp(0, 2**bits - 1)
        found.append((weight - (codes - zero) * step).square().mean(1))
    return torch.stack(found).amin(0)


def table_error(weight, name, bits):
    steps = steps_of(weight)
    return errors(steps, fit_levels(name, steps, bits)) * weight.abs().amax(1).square()


# -------------------------------------------------------------------------------------------------- any table


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 40), st.integers(2, 9))
def test_sums_over_sorted_rows_are_those_of_rounding(seed, n, count):
    rows = normal(3, n, seed=seed).half().float()
    rows[0] = 0
    levels = normal(3, 1 << count.bit_length(), seed=seed + 1).half().float().sort(-1).values
    levels[1, 1] = levels[1, 0]  # a level twice
    sorted_rows = SortedRows(rows)
    made = rounded(rows[:, None], levels[:, None])[:, 0]
    torch.testing.assert_close(sorted_rows.error(levels).float(), (rows - made).square().sum(1))
    counts, totals, _ = sorted_rows.cells(levels)
    assert torch.equal(counts.sum(1), torch.full((3,), float(n), dtype=torch.float64))
    torch.testing.assert_close((counts * levels).sum(1).float(), made.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(totals.sum(1).float(), rows.sum(1), rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(PER_ROW), st.integers(0, 9999), st.floats(0.4, 1), st.sampled_from([None, 8]))
def test_fake_is_dequantize_of_quantize_bit_for_bit(kind, seed, factor, group):
    name, bits = kind
    weight = normal(5, 24, seed=seed) * 0.1
    weight[0], weight[1], weight[2, 1:] = 0, 0.3, 0  # all zero, constant, one weight alone
    groups = 3 if group else 1
    clip = torch.full((2, 5, groups), factor)
    levels = fit_levels(name, weight_steps(weight, clip, group), bits)
    check_levels(levels, bits)
    assert levels.shape == (5, groups, 1 << bits)
    codes, scales = quantize_weight(weight, bits, clip, group, "table", levels)
    made = decode(codes.unflatten(1, (groups, -1)), "table", bits, levels) * scales[..., None]
    assert torch.equal(fake_quantize_weight(weight, bits, clip, group, "table", levels), made.flatten(1))
    if name != "dual_binary_plain":  # fitted: a row of zeros stays zero
        assert torch.equal(made[0], torch.zeros_like(made[0]))
    # nearest-level assignment, by looking at every level
    steps = weight_steps(weight, clip, group)
    distance = (steps[..., None] - levels.float()[:, :, None]).abs()
    torch.testing.assert_close((steps - rounded(steps, levels)).abs(), distance.amin(-1))


@pytest.mark.slow(but=["normal-None", "heavy-32"])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("draw", [normal, heavy])
def test_no_table_beats_lloyd(draw, group):
    weight = draw(8, 128, seed=3)
    steps = weight_steps(weight, None, group)
    for bits in TABLES["lloyd"].bits:
        best = (steps - rounded(steps, fit_levels("lloyd", steps, bits))).square().sum(-1)
        for name in (n for n, table in TABLES.items() if bits in table.bits):
            made = (steps - rounded(steps, fit_levels(name, steps, bits))).square().sum(-1)
            assert (best <= made + 1e-4).all(), (name, bits)  # levels are rounded to half precision
    assert best.sum() < 0.3 * steps.square().sum() / 32


def test_lloyd_reaches_the_known_optimum_of_the_normal_distribution():
    """Max (1960): squared errors of the best 2, 4, 8 and 16 levels."""
    weight = normal(4, 2**15)
    for bits, known in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        assert table_error(weight, "lloyd", bits).mean().item() == pytest.approx(known, rel=0.02)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(APART), st.integers(0, 999))
def test_rows_are_fitted_apart_and_whatever_their_scale(kind, seed):
    weight = heavy(4, 64, seed)
    levels = fit_levels(kind[0], steps_of(weight), kind[1])
    assert torch.equal(levels[1:2], fit_levels(kind[0], steps_of(weight[1:2]), kind[1]))
    assert torch.equal(levels, fit_levels(kind[0], steps_of(weight * 4), kind[1]))


# -------------------------------------------------------------------------------------------------- one plane


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.floats(-1, 1))
def test_binary_is_the_sign_of_the_centred_weight(seed, shift):
    rows = normal(4, 50, seed=seed).double() * 0.2 + shift
    mean, size = (p[:, None] for p in binary_start(rows, 1).unbind(-1))
    residual = rows - mean
    made = torch.where(residual >= 0, mean + size, mean - size)  # sign(0) = +1
    levels = torch.cat([mean - size, mean + size], dim=1)
    nearest = levels.gather(1, (rows[..., None] - levels[:, None]).abs().argmin(-1))
    assert torch.allclose(nearest, made)
    error = (rows - made).square().sum(1)
    # the energy identity, and no other size is better
    torch.testing.assert_close(error, residual.square().sum(1) - 50 * size[:, 0].square(), rtol=1e-5, atol=0)
    for factor in (0.9, 1.1):
        assert (error < (residual - factor * size * (made - mean).sign()).square().sum(1)).all()


def test_binary_planes_are_balanced_and_beat_an_integer_zero_point():
    weight = normal(16, 4096) + 0.3
    steps = steps_of(weight)
    codes = encode(steps, "table", 1, fit_levels("binary", steps, 1))
    assert set(codes.unique().tolist()) == {-1, 0}  # no third value
    assert (codes + 1).float().mean(-1).sub(0.5).abs().max() < 0.05
    assert table_error(normal(16, 4096), "binary", 1).mean().item() == pytest.approx(
        1 - 2 / torch.pi, rel=0.02
    )


def test_the_plane_of_centred_weights_says_the_most():
    """BiBERT's reason to centre them: nearly a bit of entropy for each weight, which the plain sign does not have."""
    weight = normal(16, 4096) + 0.5 * torch.arange(16)[:, None] / 16
    steps = steps_of(weight)
    codes = encode(steps, "table", 1, fit_levels("binary", steps, 1))

    def entropy(plane):
        share = plane.double().mean(-1)
        return -(share * share.log2() + (1 - share) * (1 - share).log2())

    assert (entropy(codes.flatten(1) == 0) >= 0.99).all() and (entropy(codes.flatten(1) == 0) <= 1).all()
    assert entropy(weight[-1:] > 0).item() < 0.95


@pytest.mark.parametrize("width", [64, 77])
def test_a_plane_is_multiplied_by_counting_equal_bits(width):
    """XNOR and a count of ones over packed bits give the product with inputs of ±1, and with two numbers a row, the
    mean and the size, all of the layer's."""
    torch.manual_seed(0)
    layer = QuantizedLinear(
        nn.Linear(width, 9, bias=False), 1, None, weight_clip=False, weight_format="binary"
    )
    packed, x = layer.bake(), torch.randn(5, width).sign()
    bits = pack((x > 0).to(torch.int8) - 1, 1)  # codes of one bit are -1 and 0
    assert packed.codes.shape == (9, bits.shape[1])
    ones = torch.tensor([bin(byte).count("1") for byte in range(256)])
    product = width - 2 * ones[(bits[:, None] ^ packed.codes).long()].sum(-1)
    codes = unpack(packed.codes, 1, width)
    assert torch.equal(product.float(), x @ (2.0 * codes + 1).T)
    low, high = (packed.levels.float() * packed.weight_scale[..., None]).flatten(1).unbind(-1)
    expected = (low + high) / 2 * x.sum(1, keepdim=True) + (high - low) / 2 * product
    torch.testing.assert_close(packed(x), expected, atol=1e-5, rtol=0)


def test_gradients_of_a_plane_stop_at_the_trained_range():
    """BiBERT's stop where |w - mean| > 1; here the range is the row's own, times a trained factor."""
    weight = normal(4, 60).requires_grad_()
    low, high = weight.detach().aminmax(dim=1, keepdim=True)
    levels = fit_levels("binary", steps_of(weight.detach()), 1).float()
    fake_quantize_weight(
        weight, 1, torch.full((2, 4, 1), 0.4), number="table", levels=levels
    ).sum().backward()
    outside = (weight < 0.4 * low) | (weight > 0.4 * high)
    ends = (weight == low) | (weight == high)  # which decide the range
    assert outside.any() and (weight.grad[outside & ~ends] == 0).all() and (weight.grad[~outside] == 1).all()


# -------------------------------------------------------------------------------------------------- two planes


def test_dual_binary_starts_as_a_uniform_grid():
    rows = normal(4, 64)
    levels = as_table(dual_levels(dual_plain(rows, 2), 2))
    assert torch.equal(levels, torch.tensor([-0.5, 0, 0.5, 1]).expand(4, -1))
    uniform = (rows / 0.5).round().clamp(-1, 2) * 0.5
    table = levels.half()[:, None]
    assert torch.equal(rounded(rows[:, None], table)[:, 0], uniform)
    assert torch.equal(fit_levels("dual_binary_plain", rows[:, None], 2), table)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([normal, heavy]))
def test_dual_binary_has_four_levels_of_two_scales_and_least_squares(seed, draw):
    steps = steps_of(draw(6, 96, seed=seed))
    scales = fit_parameters("dual_binary", steps, 2)[:, 0]
    first, second = scales.unbind(-1)
    assert (second.abs() <= first.abs()).all()
    levels = levels_for("dual_binary", scales, 2)
    expected = torch.stack([torch.zeros_like(first), first, second, first + second], dim=-1)
    torch.testing.assert_close(levels, as_table(expected), rtol=0, atol=5e-4)
    # DB-LLM's rule for its planes is nearest-level assignment, for a row or its mirror image
    flip = first.sign()[:, None]
    w, a, b = steps[:, 0] * flip, first[:, None] * flip, second[:, None] * flip
    plane1 = (w >= (a + b) / 2).float()
    plane2 = (-(w - a * plane1 - b / 2) * -b.sign() >= 0).float()
    made, near = a * plane1 + b * plane2, rounded(steps, levels[:, None])[:, 0] * flip
    torch.testing.assert_close((w - made).abs(), (w - near).abs(), rtol=0, atol=2e-3)
    # no other pair of scales is better for these planes, unless it leaves [-1, 1]; nor the start
    planes = torch.stack([plane1, plane2], dim=-1).double()
    best = torch.linalg.lstsq(planes, w.double()[..., None]).solution
    least = (planes @ best - w.double()[..., None]).square().sum((1, 2))
    error = (steps - rounded(steps, levels[:, None])).square().sum((1, 2)).double()
    inside = levels.abs().amax(1) < 0.999
    assert (error <= least * 1.02 + 1e-4)[inside].all()
    assert (
        errors(steps, levels[:, None]) <= errors(steps, fit_levels("dual_binary_plain", steps, 2)) + 1e-5
    ).all()


def test_dual_binary_against_two_bits_of_a_grid():
    """Foundations, section 14: 0.139 for the normal distribution, where two affine bits have 0.147 to 0.15."""
    weight = normal(8, 4096)
    assert table_error(weight, "dual_binary", 2).mean() < 0.139 < affine_error(weight, 2).mean()
    for mirrored in (weight.abs() - 0.5, 0.5 - weight.abs()):  # an orientation of its own for each row
        assert table_error(mirrored, "dual_binary", 2).mean() < 0.06


def test_planes_of_normal_weights_are_sparse():
    steps = steps_of(normal(16, 2048))
    first, second = fit_parameters("dual_binary", steps, 2).unbind(-1)
    made = rounded(steps, fit_levels("dual_binary", steps, 2))
    density = [(made - level[..., None]).abs() < 1e-3 for level in (first, second, first + second)]
    ones = (density[0] | density[2]).float().mean() + (density[1] | density[2]).float().mean()
    assert ones / 2 <= 0.5


# ------------------------------------------------------------------------------------------- grid and residual


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([3, 4]), st.sampled_from([normal, heavy]))
def test_residual_is_the_grid_and_the_mean_magnitude_of_what_it_leaves(seed, bits, draw):
    rows = steps_of(draw(5, 80, seed=seed))[:, 0].double()
    lowest, step, size = (p[:, None] for p in residual_start(rows, bits).unbind(-1))
    codes = ((rows - lowest) / step).round().clamp(0, (1 << (bits - 1)) - 1)
    residual = rows - (lowest + codes * step)
    torch.testing.assert_close(residual.abs().mean(1, keepdim=True), size, rtol=1e-9, atol=1e-9)
    made = rows - residual + torch.where(residual >= 0, size, -size)
    error = (rows - made).square().sum(1)
    torch.testing.assert_close(error, residual.square().sum(1) - 80 * size[:, 0].square())  # energy identity
    assert (error <= residual.square().sum(1)).all()  # one plane more is never worse
    parameters = torch.cat([lowest, step, size], dim=1)
    levels = as_table(residual_levels(parameters, bits))
    near = SortedRows(rows).error(levels)
    assert (near <= error + 1e-9).all()
    inside = ((size < step / 2) & (rows.abs() <= levels.abs().amax(1, keepdim=True)))[:, 0]
    grid = (levels == levels.clamp(-0.999999, 0.999999)).all(1)  # nothing of it was cut
    torch.testing.assert_close(near[inside & grid], error[inside & grid])
    zero = (lowest + step * torch.arange(1 << (bits - 1))).abs().amin(1)
    torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-9)  # zero is on the grid


def test_residual_of_uniform_weights_is_a_grid_with_one_bit_more():
    weight = torch.rand(16, 8192, generator=torch.Generator().manual_seed(0)) * 2 - 1
    _, step, size = residual_start(weight.double(), 5).unbind(-1)
    assert (size / step).mean().item() == pytest.approx(0.25, rel=0.02)
    assert table_error(weight, "residual", 5).mean() < 1.1 * affine_error(weight, 5).mean()


@pytest.mark.parametrize("bits", [3, 4])
def test_residual_beats_one_more_bit_only_where_tails_are_heavy(bits):
    weight = heavy(24, 2048)
    assert table_error(weight, "residual", bits).mean() < affine_error(weight, bits).mean()
    bell = normal(24, 2048)
    assert table_error(bell, "residual", bits).mean() > affine_error(bell, bits).mean()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([3, 4]))
def test_joint_search_is_no_worse_than_one_after_the_other(seed, bits):
    rows = steps_of(heavy(6, 64, seed))[:, 0].double()
    sorted_rows = SortedRows(rows)
    each = [residual_start(rows, bits, (share,)) for share in SHRINK]
    grids = torch.stack([sorted_rows.error(residual_levels(p * p.new_tensor([1, 1, 0]), bits)) for p in each])
    chosen = torch.stack(each)[grids.argmin(0), torch.arange(6)]
    joint = residual_start(rows, bits)
    before, after = (sorted_rows.error(as_table(residual_levels(p, bits))) for p in (chosen, joint))
    assert (after <= before + 1e-12).all()


# ----------------------------------------------------------------------------------------------- power, rounding


def test_power_levels_are_odd_monotone_and_differentiable():
    for exponent in (0.2, 0.6, 1.5):
        table = power_levels(exponent, 4).flatten()[1:]
        assert torch.allclose(table, -table.flip(0)) and bool((table.diff() > 0).all()) and table[7] == 0
    exponent = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    power_levels(exponent, 4).sum().backward()
    assert exponent.grad.abs() < 1e-6  # odd: what one side gains the other loses
    power_levels(exponent, 4)[..., 9:].sum().backward()
    higher, lower = (power_levels(0.6 + d, 4)[..., 9:].sum() for d in (1e-3, -1e-3))
    assert exponent.grad.item() == pytest.approx(((higher - lower) / 2e-3).item(), rel=1e-3)
    outside = torch.tensor(9.0, requires_grad=True)
    assert torch.equal(power_levels(outside, 4), power_levels(1.5, 4))


@pytest.mark.parametrize(("name", "bits"), PER_ROW)
@pytest.mark.parametrize("group", [None, 48])
def test_gptq_lowers_the_output_error(name, bits, group):
    weight, mixing = normal(8, 96), normal(96, 96, seed=1)
    x = normal(400, 96, seed=2) @ mixing
    levels = fit_levels(name, weight_steps(weight, None, group), bits)
    codes, scale = quantize_weight(weight, bits, None, group, "table", levels)

    def output_error(codes):
        made = decode(codes.unflatten(1, (scale.shape[1], -1)), "table", bits, levels) * scale[..., None]
        return ((made.flatten(1) - weight) @ x.T).square().sum()

    assert torch.equal(gptq(weight, torch.eye(96), scale, bits, number="table", levels=levels), codes)
    better = gptq(weight, 2 * x.T @ x / len(x), scale, bits, number="table", levels=levels)
    assert output_error(better) < 0.9 * output_error(codes)


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(("name", "bits"), TRAINED)
@pytest.mark.parametrize("act_bits", [None, 8])
def test_a_layer_learns_its_levels_and_bakes_to_what_it_computed(name, bits, act_bits):
    torch.manual_seed(0)
    linear, x = nn.Linear(16, 8), normal(40, 16, seed=3)
    layer = QuantizedLinear(
        linear, bits, act_bits, [LearnedKronecker(16)], weight_format=name, train_levels=True,
        group_size=None if act_bits else 8,
    )  # fmt: skip
    (table,) = layer.level_parameters()
    start = table.detach().clone()
    optimizer = torch.optim.Adam([table], lr=2e-3)
    losses = []
    for _ in range(40):
        loss = (layer(x) - linear(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert torch.isfinite(table.grad).all()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < losses[0] and not torch.equal(table, start)
    check_levels(layer.levels.detach(), bits)
    assert torch.equal(layer.levels, layer.levels.half().float())
    layer.freeze()
    packed = layer.bake()
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(packed.levels.float(), layer.levels)


@pytest.mark.parametrize(("name", "shape"), [("lloyd", (6, 2, 8)), ("power", (1, 1, 1))])
def test_the_gradient_of_a_level_is_the_sum_over_its_weights(name, shape):
    weight, grad = normal(6, 24), normal(6, 24, seed=1)
    parameters = fit_parameters(name, weight_steps(weight, None, 12), 3).requires_grad_()
    assert parameters.shape == shape
    levels = levels_for(name, parameters, 3)
    levels.retain_grad()
    fake_quantize_weight(weight, 3, None, 12, "table", levels).backward(grad)
    codes, scale = quantize_weight(weight, 3, None, 12, "table", levels.detach())
    places = (codes.long() + 4).unflatten(1, (2, 12))
    table = levels.detach().expand(6, 2, 8).clone().requires_grad_()
    (table.gather(-1, places) * scale[..., None]).flatten(1).backward(grad)
    torch.testing.assert_close(levels.grad, table.grad.sum_to_size(levels.shape))
    assert (parameters.grad != 0).any()


def test_levels_that_are_not_trained_and_formats_without_any():
    layer = QuantizedLinear(nn.Linear(8, 8), 2, None, weight_format="dual_binary")
    assert layer.level_parameters() == [] and not layer.levels.requires_grad
    for name in ("int", "nf4"):
        with pytest.raises(AttarError, match=f"{name} has no levels to train") as raised:
            QuantizedLinear(nn.Linear(8, 8), 4, None, weight_format=name, train_levels=True)
        assert "lloyd" in raised.value.fix
