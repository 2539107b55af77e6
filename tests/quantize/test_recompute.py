"""Backward passes that keep little: the same numbers, less memory."""

import inspect

import pytest
import torch
from torch import nn

from attar.models.arithmetic import Arithmetic
from attar.quantize import recompute
from attar.quantize.learned_codes import LearnedCodes
from attar.quantize.linear import QuantizedLinear
from attar.quantize.low_rank import LowRankSettings, start_branch
from attar.quantize.polish import ScaledCodes
from attar.quantize.transforms import LearnedKronecker, LearnedScale

D, OUT = 48, 20


def layer_of(kind):
    torch.manual_seed(0)
    linear = nn.Linear(D, OUT)
    transforms = [LearnedScale(torch.rand(D) + 0.5), LearnedKronecker(D)]
    layer = QuantizedLinear(linear, 4, 4, transforms, shift=torch.randn(D))
    if kind == "branch":
        start_branch(layer, LowRankSettings(rank=2))
        for part in layer.branch_parameters():
            part.requires_grad_()
    if kind == "codes":
        layer.freeze()
        return LearnedCodes(layer)
    return ScaledCodes(layer.bake()) if kind == "scales" else layer


def gradients(layer, x, autocast=False):
    """The output, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    layer.zero_grad()
    (y.float() * torch.linspace(-1, 1, OUT)).square().sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **found}


@pytest.mark.parametrize("kind", ["plain", "branch", "codes", "scales"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_the_same_bits(kind, autocast, monkeypatch):
    layer, x = layer_of(kind), torch.randn(2, 9, D)
    kept = gradients(layer, x, autocast)
    monkeypatch.setattr(recompute, "LEAST", 1)
    anew = gradients(layer, x, autocast)
    assert len(kept) >= 3 and kept.keys() == anew.keys()
    for name, value in kept.items():
        assert torch.equal(value, anew[name]) and value.any(), name


@pytest.mark.parametrize("kind", ["plain", "branch", "codes", "scales"])
def test_pieces_differ_by_the_order_of_sums(kind, monkeypatch):
    layer, x = layer_of(kind), torch.randn(2, 9, D)
    whole = gradients(layer, x)
    monkeypatch.setattr(recompute, "LEAST", 1)
    monkeypatch.setattr(recompute, "PIECE", 5 * D)  # 18 rows: three pieces of five, and one of three
    pieces = gradients(layer, x)
    assert pieces["output"].shape == (2, 9, OUT)
    for name, value in whole.items():
        assert torch.allclose(value, pieces[name], rtol=1e-4, atol=1e-4 * value.abs().max().item()), name


def test_gradients_of_pieces_are_not_added_up_in_bfloat16(monkeypatch):
    layer, x = layer_of("branch"), torch.randn(4096, D) + 0.5

    def of_branch(precision):
        layer.zero_grad()
        with Arithmetic(precision, "cpu")():
            y = layer(x)
        (y.float() * torch.linspace(0, 1, OUT)).square().mean().backward()
        return [part.grad.clone() for part in layer.branch_parameters()]

    monkeypatch.setattr(recompute, "LEAST", 1)
    exact, whole = of_branch("float32"), of_branch("bfloat16")
    monkeypatch.setattr(recompute, "PIECE", 16 * D)  # 256 pieces
    for full, once, added in zip(exact, whole, of_branch("bfloat16"), strict=True):
        assert (added - full).norm() < 1.5 * (once - full).norm()


def test_a_layer_keeps_its_input_and_its_weight_alone(monkeypatch):
    layer, x = layer_of("plain"), torch.randn(400, D, requires_grad=True)

    def kept():
        seen = {}

        def note(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = layer(x)
        return sum(seen.values()), y

    before, _ = kept()
    monkeypatch.setattr(recompute, "LEAST", 1)
    after, y = kept()
    weights = 4 * D * OUT
    assert after <= x.nbytes + 2 * weights < before / 3, (before, after)
    y.sum().backward()
    assert x.grad is not None


def test_small_layers_and_evaluation_keep_what_they_have(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("there is nothing to compute anew")

    monkeypatch.setattr(recompute, "checkpoint", refuse)
    layer, x = layer_of("plain"), torch.randn(2, 9, D)
    gradients(layer, x)
    monkeypatch.setattr(recompute, "LEAST", 1)
    with torch.no_grad():
        layer(x)
    with pytest.raises(AssertionError, match="nothing to compute"):
        layer(x)


def test_a_checkpointed_module_runs_again_and_is_as_before():
    layer, x = layer_of("plain"), torch.randn(2, 9, D)
    kept, called = gradients(layer, x), []
    layer.register_forward_hook(lambda *_: called.append(1))
    signature = inspect.signature(layer.forward)
    with recompute.checkpointed([layer, layer]):
        assert inspect.signature(layer.forward) == signature  # callers bind arguments by it
        again = gradients(layer, x)
    assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)
    assert len(called) == 1 and "forward" not in vars(layer)
    layer.forward = own = lambda x: x
    with pytest.raises(ZeroDivisionError), recompute.checkpointed([layer]):
        raise ZeroDivisionError
    assert layer.forward is own
