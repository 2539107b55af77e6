"""Quantized distillation (arXiv 1802.05668): what one step of it is.

The gradient of trained points, a sum over the weights that are nearest: tests/quantize/test_row_tables.py.
"""

import copy
from dataclasses import replace

import pytest
import torch
from support.toy import WEIGHTS, Toy
from torch import nn

from attar.quantize.formats import fake_quantize_weight


def student(bits=4):
    """A toy whose student is not its teacher, and the same two linears in full precision."""
    toy = Toy(bits=bits, acts=4)
    with torch.no_grad():
        for layer in toy.layers.values():
            layer.weight = nn.Parameter(
                layer.weight + 0.1 * torch.randn_like(layer.weight), requires_grad=False
            )
    plain = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    for name, layer in toy.layers.items():
        plain[int(name)].load_state_dict({"weight": layer.weight, "bias": layer.bias})
        plain[int(name)].bias.requires_grad_(False)
    return toy, plain


@pytest.mark.parametrize("steps", [1, 5])
def test_with_quantizers_that_round_nothing_a_step_is_a_plain_one(steps):
    """The optimizer's own, on the weights, against the teacher's outputs."""
    toy, plain = student()
    for layer in toy.layers.values():
        layer.weight_quant = layer.act_quant = False
    tuner = toy.tuner(replace(WEIGHTS, steps=steps, batch_size=7, max_norm=None))
    weights = [plain[0].weight, plain[2].weight]
    optimizer = torch.optim.AdamW(weights, lr=WEIGHTS.weight_lr, betas=(0.9, 0.95), weight_decay=0)
    x, y = (
        torch.cat([pair[i] for pair in ((c.streams["x"], t["y"]) for c, t in toy.samples)]) for i in (0, 1)
    )
    before = [weight.detach().clone() for weight in weights]
    for step in range(steps):
        tuner.train(until=step + 1)
        optimizer.param_groups[0]["lr"] = tuner._main.param_groups[0]["lr"]
        optimizer.zero_grad()
        (plain(x) - y).square().mean().backward()
        optimizer.step()
    for name, weight, old in zip(("0", "2"), weights, before, strict=True):
        torch.testing.assert_close(toy.layers[name].weight, weight, atol=1e-6, rtol=0)
        assert (weight - old).abs().max() > 1e-4


def test_a_step_moves_the_weights_by_the_gradient_of_their_rounded_copy():
    """Straight through: the full-precision weights get what the rounded ones get, and keep what rounding hides."""
    toy, plain = student()
    for layer in toy.layers.values():
        layer.act_quant, layer.quantizer.clip_logit = False, None
    kept = copy.deepcopy({name: layer.weight for name, layer in toy.layers.items()})
    rounded = {name: fake_quantize_weight(weight.detach(), 4) for name, weight in kept.items()}
    for name, weight in rounded.items():
        plain[int(name)].weight.data.copy_(weight)
    tuner = toy.tuner(replace(WEIGHTS, steps=1, batch_size=7, max_norm=None))
    tuner.train()
    for call, target in toy.samples:
        ((plain(call.streams["x"]) - target["y"]).square().mean() / len(toy.samples)).backward()
    for name, layer in toy.layers.items():
        inner = kept[name].abs() < kept[name].abs().amax(
            1, keepdim=True
        )  # the largest decides the step as well
        torch.testing.assert_close(
            layer.weight.grad[inner], plain[int(name)].weight.grad[inner], atol=1e-7, rtol=1e-4
        )
        moved = (layer.weight - kept[name]).detach()
        assert moved.abs().max() <= 1.01 * WEIGHTS.weight_lr and (moved * layer.weight.grad <= 0).all()
