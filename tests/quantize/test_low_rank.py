"""The low-rank branch: closed forms, and layers that keep it through baking (foundations, sections 12 and 13)."""

import itertools

import pytest
import torch
from torch import nn

from attar.errors import AttarError
from attar.quantize.formats import fake_quantize_weight
from attar.quantize.linear import QuantizedLinear
from attar.quantize.low_rank import LowRankSettings, start_branch
from attar.quantize.transforms import LearnedKronecker, LearnedScale

OUT, IN = 24, 32


def make(bits=4, act_bits=None, transforms=(), dominant=0, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight[:, :dominant] *= 12
    return linear, QuantizedLinear(linear, bits, act_bits, transforms, weight_clip=False, act_clip=False)


def relative(layer, linear, x):
    with torch.no_grad():
        expected = linear(x)
        return ((layer(x) - expected).square().sum() / expected.square().sum()).item()


def test_full_rank_is_exact():
    linear, layer = make()
    assert start_branch(layer, LowRankSettings(rank=OUT, iterations=0)) == []
    x = torch.randn(6, IN)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-4)


def test_dominant_channels_go_into_the_branch():
    x, errors = torch.randn(64, IN), []
    for rank in (None, 2, 4, 8, 16):
        linear, layer = make(dominant=4)
        if rank is not None:
            start_branch(layer, LowRankSettings(rank=rank))
        errors.append(relative(layer, linear, x))
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[0] > 10 * errors[3]  # rank 8


def test_the_first_branch_is_the_best_approximation_of_its_rank():
    """Eckart and Young: what is left of the weight has the squared singular values from the rank on."""
    linear, layer = make()
    start_branch(layer, LowRankSettings(rank=5, iterations=0))
    values = torch.linalg.svdvals(linear.weight.detach())
    left = linear.weight - layer.branch_out @ layer.branch_in
    torch.testing.assert_close(left.square().sum(), values[5:].square().sum())


def test_the_error_start_takes_the_leading_part_of_the_error():
    linear, layer = make()
    quantized = fake_quantize_weight(linear.weight.detach(), 4)
    values = torch.linalg.svdvals(linear.weight.detach() - quantized)
    start_branch(layer, LowRankSettings(rank=5, start="error", iterations=0))
    unmerged = linear.weight - quantized - layer.branch_out @ layer.branch_in
    torch.testing.assert_close(unmerged.square().sum(), values[5:].square().sum())


def test_iterations_never_make_the_kept_branch_worse():
    kept = []
    for iterations in (0, 1, 4, 10):
        linear, layer = make()
        errors = start_branch(layer, LowRankSettings(rank=4, start="error", iterations=iterations))
        assert len(errors) == (iterations + 1 if iterations else 0)
        with torch.no_grad():
            weight = layer.rounded(linear.weight - layer.branch_out @ layer.branch_in)
            left = linear.weight - weight - layer.branch_out @ layer.branch_in
        found = (left.square().sum() / linear.weight.square().sum()).item()
        assert not errors or found == pytest.approx(min(errors), rel=1e-3)
        kept.append(found)
    assert all(a >= b for a, b in itertools.pairwise(kept)) and kept[-1] < kept[0]


def test_the_output_metric_is_the_optimum_for_the_inputs_that_come():
    """Error drop of the best rank-1 branch: the top squared singular value of Δ C^{1/2} (Q-VDiT spec, 2.2)."""
    x = torch.randn(2000, IN) * torch.linspace(0.1, 4, IN)
    moment = x.T @ x / len(x)
    linear, layer = make()
    delta = linear.weight.detach() - fake_quantize_weight(linear.weight.detach(), 4)
    root = torch.linalg.cholesky(moment)  # any square root has the same singular values
    values = torch.linalg.svdvals(delta @ root).square()
    settings = LowRankSettings(rank=1, start="error", iterations=0, metric="output")
    start_branch(layer, settings, moment)
    unmerged = delta - layer.branch_out.detach() @ layer.branch_in.detach()
    left = ((x @ unmerged.T).square().sum() / len(x)).item()
    assert left == pytest.approx(values[1:].sum().item(), rel=0.01)
    _, plain = make()
    start_branch(plain, LowRankSettings(rank=1, start="error", iterations=0))
    worse = delta - plain.branch_out.detach() @ plain.branch_in.detach()
    assert left < (x @ worse.T).square().sum().item() / len(x)


@pytest.mark.parametrize("act_bits", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_baked_with_transforms_the_branch_acts_on_the_input_as_it_comes(act_bits, dtype):
    chain = [LearnedScale(torch.linspace(0.5, 2, IN)), LearnedKronecker(IN)]
    linear, layer = make(4, act_bits, chain, dominant=2)
    linear, layer = linear.to(dtype), QuantizedLinear(linear.to(dtype), 4, act_bits, chain)
    x = torch.randn(10, IN, dtype=dtype)
    before = relative(layer, linear, x)
    start_branch(layer, LowRankSettings(rank=6))
    assert relative(layer, linear, x) < before or act_bits is not None
    layer.freeze()
    packed = layer.bake()
    assert packed.low_rank == 6 and packed.low_rank_in.dtype == dtype
    tight = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(packed(x), layer(x), **tight)
    loose = {"rtol": 0.05, "atol": 0.1 * linear.weight.abs().max().item()}
    torch.testing.assert_close(packed.weight + 0, linear.weight.detach(), **loose)


def test_what_cannot_be():
    _, layer = make()
    with pytest.raises(AttarError, match="rank 25 does not fit"):
        start_branch(layer, LowRankSettings(rank=25))
    with pytest.raises(AttarError, match="needs calibration inputs"):
        start_branch(layer, LowRankSettings(rank=2, metric="output"))
    with pytest.raises(AttarError, match="no start 'ones'"):
        LowRankSettings(start="ones")
    with pytest.raises(AttarError, match="must be subtracted"):
        LowRankSettings(subtract=False)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("deployed", [torch.bfloat16, torch.float16])
def test_a_branch_is_subtracted_with_the_numbers_that_it_is_deployed_with(bits, deployed):
    """Learned in float32 and packed in half precision: what its rounding takes away is quantized with the rest."""
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=False)
    with torch.no_grad():
        linear.weight[:, :2] *= 40
    x, errors = torch.randn(64, IN), {}
    for kind in (None, deployed):
        layer = QuantizedLinear(linear, bits, None, weight_clip=False, deployed=kind)
        start_branch(layer, LowRankSettings(rank=4))
        with torch.no_grad():
            learned = layer(x)
        packed = layer.bake().to(deployed)
        weight = packed_weight(packed)
        errors[kind] = ((x @ weight.T - linear(x)).square().mean() / linear(x).square().mean()).item()
        if kind is not None:
            torch.testing.assert_close(learned, x @ weight.T, rtol=1e-4, atol=1e-4)
            assert torch.equal(packed.low_rank_in.float(), layer.branch_in.to(deployed).float())
    factor = (
        0.3 if bits == 8 and deployed == torch.bfloat16 else 1.0
    )  # with few bits the codes' own error is larger
    assert errors[deployed] < errors[None] * factor, errors


def packed_weight(packed):
    """(out, in) in float32, of the numbers that are stored."""
    return packed.unpacked().float() * packed.weight_scale.float() + (
        packed.low_rank_out.float() @ packed.low_rank_in.float()
    )


def test_a_deployed_branch_still_learns():
    """Where nothing is lost its gradient is, to the bit, that of a branch that stays as it is."""
    _, plain = make(dominant=2)
    start_branch(plain, LowRankSettings(rank=3))
    down, up = (part.bfloat16().float() for part in (plain.branch_in, plain.branch_out))
    gradients = []
    for deployed in (None, torch.bfloat16):
        layer = QuantizedLinear(make(dominant=2)[0], 4, None, weight_clip=False, deployed=deployed)
        layer.set_branch(down, up)
        layer.branch_in.requires_grad_(True)
        layer(torch.randn(6, IN, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        gradients.append(layer.branch_in.grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_a_branch_that_overflows_where_it_is_deployed_is_refused():
    """float16 ends at 65504: from there on it would be infinite, and the codes beside it those of nothing."""
    layer = QuantizedLinear(nn.Linear(IN, OUT), 4, None, weight_clip=False, deployed=torch.float16)
    down, up = torch.full((1, IN), 6e4), torch.full((OUT, 1), 1e-6)
    with pytest.raises(AttarError, match="not finite in float16"):
        layer.set_branch(2 * down, up)
    layer.set_branch(down, up)
    with torch.no_grad():
        layer.branch_in.mul_(2)  # as training may
    with pytest.raises(AttarError, match="not finite in float16"):
        layer.bake()
    wider = QuantizedLinear(nn.Linear(IN, OUT), 4, None, weight_clip=False, deployed=torch.bfloat16)
    wider.set_branch(2 * down, up)
    assert bool(torch.isfinite(wider.bake().low_rank_in).all())
