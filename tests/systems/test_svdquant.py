"""SVDQuant (arXiv 2411.05007): a branch of nothing, and what a layer is with its branch merged.

Closed forms, dominant channels and iterations: tests/quantize/test_low_rank.py.
"""

import pytest
import torch
from torch import nn

from attar.errors import AttarError
from attar.quantize.linear import QuantizedLinear
from attar.quantize.low_rank import LowRankSettings, start_branch

OUT, IN = 24, 32


def layer_of(acts, group_size=None):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    return QuantizedLinear(linear, 4, acts, group_size=group_size, weight_clip=False, act_clip=False)


@pytest.mark.parametrize(("acts", "group_size"), [(None, None), (None, 16), (4, None)])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_branch_of_nothing_is_plain_quantization_bit_for_bit(rank, acts, group_size):
    """Of rank 0, and of any rank whose factors are zero: codes, scales and outputs, learning and packed.

    A recipe says `low_rank: null` for none; a rank of 0 is refused, so no packed layer has it.
    """
    plain, layer = (layer_of(acts, group_size) for _ in range(2))
    layer.set_branch(torch.zeros(rank, IN), torch.zeros(OUT, rank))
    x = torch.randn(10, IN)
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))
        for part in (layer, plain):
            part.freeze()
        assert torch.equal(layer.codes, plain.codes) and torch.equal(layer(x), plain(x))
        if rank:
            ours, theirs = layer.bake(), plain.bake()
            assert ours.low_rank == rank and torch.equal(ours.weight_scale, theirs.weight_scale)
            assert torch.equal(ours(x), theirs(x))
    with pytest.raises(AttarError, match="cannot have rank 0"):
        LowRankSettings(rank=0)


@pytest.mark.parametrize("group_size", [None, 16])
def test_merged_into_the_weight_the_branch_gives_the_output_of_both_products(group_size):
    """B A + Q(W - B A) as one matrix, where activations stay in floating point."""
    layer = layer_of(None, group_size)
    start_branch(layer, LowRankSettings(rank=6, iterations=3))
    x = torch.randn(10, IN)
    with torch.no_grad():
        branch = layer.branch_out @ layer.branch_in
        merged = branch + layer.rounded(layer.weight - branch)
        expected = nn.functional.linear(x, merged, layer.bias)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.bake()(x), expected, atol=1e-5, rtol=0)
        assert (expected - layer_of(None, group_size)(x)).abs().max() > 1e-2
