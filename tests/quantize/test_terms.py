"""Low-rank terms of a weight, and branches whose rank decays."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attar.errors import AttarError
from attar.quantize.linear import QuantizedLinear
from attar.quantize.rank_decay import RankDecay, decay, start_auxiliary
from attar.quantize.terms import LowRankTerm, leading


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def quantized(bits=4, acts=None, seed=0, size=(24, 16)):
    torch.manual_seed(seed)
    return QuantizedLinear(nn.Linear(size[1], size[0]), bits, acts, weight_clip=False, act_clip=False)


@given(
    rank=st.integers(1, 12), rows=st.integers(12, 20), columns=st.integers(12, 20), seed=st.integers(0, 99)
)
def test_the_leading_part_is_the_best_one(rank, rows, columns, seed):
    whole = matrix(rows, columns, seed)
    term = LowRankTerm.leading(whole, rank)
    rest = torch.linalg.svdvals(whole.double())[rank:].square().sum()
    assert torch.isclose((whole - term()).double().square().sum(), rest, rtol=1e-4, atol=1e-6)


def test_of_wide_matrices_the_leading_part_is_nearly_the_best_and_always_the_same():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(600, 600, generator=generator))[0] for _ in range(2))
    values = torch.arange(1, 601).float() ** -0.5
    matrix = left * values @ right
    state = torch.random.get_rng_state()
    up, down = leading(matrix, 8)
    assert torch.equal(torch.random.get_rng_state(), state)
    best = values[8:].square().sum()
    assert (matrix - up @ down).square().sum() < 1.001 * best
    torch.manual_seed(5)
    assert all(map(torch.equal, (up, down), leading(matrix, 8)))


def test_nothing_is_zero_and_can_learn():
    term = LowRankTerm.nothing(matrix(6, 9), 3, torch.Generator().manual_seed(0))
    assert term().shape == (6, 9) and not term().any()
    term().sum().backward()
    assert term.up.grad.any() and term.gate.grad is None
    again = LowRankTerm.nothing(matrix(6, 9), 3, torch.Generator().manual_seed(0))
    assert torch.equal(term.down, again.down) and term.down.abs().max() <= 9**-0.5


@pytest.mark.parametrize("rank", [0, 7])
def test_ranks_that_do_not_fit(rank):
    with pytest.raises(AttarError, match="smaller rank"):
        LowRankTerm.leading(matrix(6, 9), rank)


@given(rank=st.integers(2, 10), data=st.data(), seed=st.integers(0, 99))
def test_truncation_changes_nothing_once_the_rest_has_faded(rank, data, seed):
    keep = data.draw(st.integers(1, rank - 1))
    term = LowRankTerm(matrix(14, rank, seed), matrix(rank, 11, seed + 1))
    whole = term()
    term.fade(keep, 1.0)
    assert torch.equal(term(), whole)
    term.fade(keep, 0.0)
    faded = term()
    assert torch.allclose(faded, term.up[:, :keep] @ term.down[:keep], atol=1e-6)
    term.truncate(keep)
    assert term.rank == keep and torch.allclose(term(), faded, atol=1e-4)
    left, right = term.up.T @ term.up, term.down @ term.down.T
    sizes = left.diagonal()
    assert torch.allclose(left, sizes.diag(), atol=1e-3) and torch.allclose(right, left, atol=1e-3)
    assert bool((sizes[:-1] >= sizes[1:] - 1e-4).all())


@pytest.mark.parametrize(
    ("rank", "keep", "ranks"),
    [(32, 0.5, [32, 16, 8, 4, 2, 1, 0]), (6, 0.5, [6, 3, 1, 0]), (4, 0.0, [4, 0]), (1, 0.5, [1, 0])],
)
def test_ranks_that_are_visited(rank, keep, ranks):
    schedule = RankDecay(rank, 10 * len(ranks), keep)
    assert schedule.ranks == ranks
    seen = [schedule.at(step) for step in range(schedule.steps + 1)]
    assert list(dict.fromkeys(found[0] for found in seen)) == ranks
    for (r, k, share), (r2, _, share2) in pairwise(seen):
        if r == r2 and r:
            assert share2 < share <= 1.0 and k == int(r * keep)
    starts = [seen[i * schedule.length][2] for i in range(len(ranks) - 1)]
    assert starts == [1.0] * (len(ranks) - 1)


def test_a_schedule_needs_steps():
    with pytest.raises(AttarError, match="5 steps are too few for 6 phases"):
        RankDecay(32, 5)
    with pytest.raises(AttarError):
        RankDecay(8, 100, keep=1.0)


def test_a_full_branch_gives_the_layer_back():
    layer = quantized()
    linear = nn.Linear(16, 24)
    linear.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = matrix(5, 16, 3)
    assert not torch.allclose(layer(x), linear(x), atol=1e-3)
    start_auxiliary({"layer": layer}, 99)
    assert layer.auxiliary.rank == 16
    assert torch.allclose(layer(x), linear(x), atol=1e-5)
    start_auxiliary({"layer": layer}, 4)
    lost = torch.linalg.svdvals((layer.weight - layer.rounded(layer.transformed_weight())).double())[4:]
    _, weight, _ = layer._evaluated()
    assert torch.isclose((weight - layer.weight).double().square().sum(), lost.square().sum(), rtol=1e-4)


def test_when_the_branch_is_gone_the_layer_is_the_plain_one_bit_for_bit():
    layer, plain = quantized(acts=4), quantized(acts=4)
    layers, schedule = {"layer": layer}, RankDecay(8, 40)
    start_auxiliary(layers, 8)
    x = matrix(5, 16, 3)
    changes = [decay(layers, schedule, step) for step in range(40)]
    assert [step for step, changed in enumerate(changes) if changed] == [10, 20, 30]
    assert layer.auxiliary is not None and layer.auxiliary.rank == 1
    with pytest.raises(AttarError, match="auxiliary branch of rank 1 is left"):
        layer.bake()
    assert decay(layers, schedule, 40) and layer.auxiliary is None
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.bake()(x), plain.bake()(x))
    assert not decay(layers, schedule, 41)


def test_an_adapter_is_merged_before_rounding():
    layer, plain = quantized(acts=4), quantized(acts=4)
    layer.adapter = LowRankTerm.nothing(layer.weight, 3, torch.Generator().manual_seed(0))
    x = matrix(5, 16, 3)
    assert torch.equal(layer(x), plain(x))
    with torch.no_grad():
        layer.adapter.up.copy_(matrix(24, 3))
    shifted = nn.Linear(16, 24)
    shifted.load_state_dict({"weight": layer.weight + layer.adapter(), "bias": layer.bias})
    merged = QuantizedLinear(shifted, 4, 4, weight_clip=False, act_clip=False)
    assert torch.equal(layer(x), merged(x))
    packed = layer.bake()
    assert torch.allclose(packed(x), layer(x), atol=1e-5) and packed.low_rank == 0
