"""EfficientDM (arXiv 2310.03270): adapters that are merged before the rounding, in layers of every kind."""

from itertools import pairwise

import pytest
import torch
from support import pipelines, tiny, unets
from torch import nn

from attar.calibration.store import TraceStore
from attar.calibration.trace import trace_pipeline
from attar.planning import plan_component
from attar.progress import SilentProgress
from attar.quantize.formats import fake_quantize, fake_quantize_tokens
from attar.quantize.linear import QuantizedLinear
from attar.quantize.plan import open_planned
from attar.quantize.terms import LowRankTerm
from attar.recipe import load_recipe
from attar.runtime.patches import PatchLinear
from attar.runtime.step_groups import StepGroups
from attar.traced import OUTPUT, TracedSteps
from attar.workspace import Workspace


def adapted(linear, bits, acts, rank=3):
    """The quantized layer with an adapter that is nothing yet."""
    layer = QuantizedLinear(linear, bits, acts, weight_clip=False, act_clip=False)
    layer.adapter = LowRankTerm.nothing(
        layer.weight, min(rank, *layer.weight.shape), torch.Generator().manual_seed(0)
    )
    return layer


@pytest.mark.parametrize(
    ("make", "call_of"),
    [(unets.condition, unets.condition_call), (tiny.wan, tiny.wan_call)],
    ids=["a U-Net", "a transformer"],
)
def test_1_of_sixteen_bits_the_whole_network_is_the_original(make, call_of):
    """Weights and activations of every layer rounded to 16 bits beside empty adapters: within 1e-3 of the output."""
    model = make().requires_grad_(False)
    call = call_of(model)
    plans = {
        plan.name: plan for plan in plan_component(model, load_recipe("efficientdm")) if not plan.skipped
    }
    errors = {}
    with torch.no_grad():
        exact = model(**call, return_dict=False)[0]
        open_planned(model, plans)
        linears = {name: model.get_submodule(name) for name in plans}
        for bits in (4, 16):
            for name, linear in linears.items():
                model.set_submodule(name, adapted(linear, bits, bits))
            errors[bits] = ((model(**call, return_dict=False)[0] - exact).norm() / exact.norm()).item()
    assert 0 < errors[16] < 1e-3 < errors[4]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": (2, 0), "dilation": 2},
        {"stride": (1, 3), "padding": "valid"},
    ],
)
def test_2_an_adapter_is_folded_into_a_convolution(options):
    """ΔW[o, i, u, v] = Σ B[o, r] A[r, i, u, v] goes into the codes; nothing is left beside the packed layer."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3, **options).requires_grad_(False), torch.randn(2, 4, 9, 11)
    patch = PatchLinear(conv)
    layer = patch.linear = adapted(patch.linear, 4, 8)
    with torch.no_grad():
        before = patch(x)
        layer.adapter.up.copy_(0.2 * torch.randn(6, 3))
        fake = patch(x)
        b, a = layer.adapter.up, layer.adapter.down.unflatten(1, (4, 3, 3))
        merged = nn.Conv2d(4, 6, 3, **options).requires_grad_(False)
        merged.weight.copy_(conv.weight + torch.einsum("or,ricd->oicd", b, a))
        merged.bias.copy_(conv.bias)
        alone = PatchLinear(merged)
        alone.linear = QuantizedLinear(alone.linear, 4, 8, weight_clip=False, act_clip=False)
        patch.linear = layer.bake()
        folded = patch(x)
        assert folded.shape == conv(x).shape and (fake - before).abs().max() > 0.1
        torch.testing.assert_close(folded, fake, atol=1e-5, rtol=0)
        torch.testing.assert_close(alone(x), fake, atol=1e-5, rtol=0)
    assert patch.linear.low_rank == 0


def test_4_samples_carry_no_graph_from_step_to_step(tmp_path):
    """What is trained on is read from files: neither inputs nor the original's outputs have a gradient, nor has the
    original. (That a group of steps has its own gradient alone: tests/quantize/test_clip_groups.py.)"""
    pipe, case = pipelines.make("wan"), pipelines.CASES["wan"]
    store = TraceStore(tmp_path / "trace")
    trace_pipeline(pipe, pipelines.PROMPTS[:1], store, steps=2, generation=case.generation)
    model = pipe.transformer.requires_grad_(True)  # what would make a graph
    samples = TracedSteps("transformer", model, store, 1, Workspace(tmp_path / "outputs"))

    def run(call):
        return {OUTPUT: model(**call.streams, **call.constants)[0]}

    with torch.enable_grad():
        samples.compute(run, 1, SilentProgress())
        found = [samples[i] for i in range(len(samples))]
        for call, target in found:
            tensors = [*call.streams.values(), *target.values()]
            assert tensors and not any(t.requires_grad or t.grad_fn is not None for t in tensors)
            torch.testing.assert_close(run(call)[OUTPUT].detach(), target[OUTPUT])
    assert len(found) == 2 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_5_the_step_size_has_the_gradient_of_lsq(bits):
    """round(x/s) - x/s inside the range, the lowest and the highest code outside; there is no zero point."""
    torch.manual_seed(0)
    x = torch.randn(400, dtype=torch.float64)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    s = torch.tensor(1.5 / -low, dtype=torch.float64, requires_grad=True)  # cuts both tails
    found = torch.stack([torch.autograd.grad(fake_quantize(value, s, bits), s)[0] for value in x])
    steps = x / s.detach()
    assert (steps < low).any() and (steps > high).any()
    inside = steps.round() - steps
    expected = torch.where(steps < low, low, torch.where(steps > high, high, inside))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_8_a_scale_for_each_token_follows_the_variance_of_the_steps():
    """Inputs that grow over the steps: the relative error is that of the first step, bit for bit where they double;
    with one scale for all steps, the best for their sum, early steps lose what late ones need.
    """
    torch.manual_seed(0)
    x = torch.randn(1, 64, 32)
    steps = torch.cat([x * 2**i for i in range(4)])
    own = fake_quantize_tokens(steps, 4)
    assert all(torch.equal(own[i + 1], 2 * own[i]) for i in range(3))

    def errors(rounded):
        return ((rounded - steps).square().sum((1, 2)) / steps.square().sum((1, 2))).tolist()

    sizes = steps.abs().max() / 7 * torch.linspace(0.2, 1, 33)
    static = min(
        (fake_quantize(steps, size, 4) for size in sizes),
        key=lambda rounded: (rounded - steps).square().sum(),
    )
    dynamic, shared = errors(own), errors(static)
    assert all(a < b for a, b in zip(dynamic, shared, strict=True)) and sum(dynamic) < 0.5 * sum(shared)


def test_9_with_half_the_steps_every_step_keeps_its_group():
    """Groups are cut by noise and not by the number of the step, so nothing has to be interpolated.

    The first half of a list by steps would give the noisy groups alone.
    """
    timesteps = [1000.0 - 50 * i for i in range(20)]
    groups = StepGroups.of_trajectory(timesteps, 4)
    full = {t: groups.group(t) for t in timesteps}
    half = timesteps[::2]
    assert [groups.group(t) for t in half] == [full[t] for t in half]
    assert {groups.group(t) for t in half} == {0, 1, 2, 3} > {full[t] for t in timesteps[: len(half)]}
    assert all(b - a in (0, 1) for a, b in pairwise(groups.group(t) for t in half))
