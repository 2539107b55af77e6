"""Layers that learn clipping factors for each group of denoising steps, in batches of one group."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.toy import WEIGHTS
from torch import nn

from attar.errors import AttarError
from attar.losses.reconstruction import mse
from attar.models.block import BlockCall
from attar.quantize.finetune import Finetuner, FinetuneSettings
from attar.quantize.linear import QuantizedLinear, parameter_groups
from attar.quantize.polish import ScaledCodes
from attar.quantize.reconstruct import ReconstructionSettings, reconstruct_block
from attar.quantize.unused_rows import keep_unused_rows
from attar.runtime.step_groups import choose_group

D, OUT = 16, 8
LOGITS = torch.tensor([[0.5, 2.0], [3.0, -0.5]])


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(D, OUT)


def grouped(logits=LOGITS, **options):
    layer = QuantizedLinear(linear(), 4, 4, clip_groups=len(logits), **options)
    layer.act_clip_logit.data.copy_(logits)
    return layer


def plain(pair):
    layer = QuantizedLinear(linear(), 4, 4)
    layer.act_clip_logit.data.copy_(pair)
    return layer


def forms(layer, x):
    """What a layer gives while it learns, frozen, with its own weight, packed, and with trained scales."""
    found = {"learning": layer(x), "input": layer.quantized_input(x)[1]}
    layer.freeze()
    found |= {"frozen": layer(x), "frozen input": layer.quantized_input(x)[1]}
    found["given"] = layer.forward_with(x, layer.quantizer.decode(layer.codes, layer._fixed().scale))
    packed = layer.bake()
    for part in (packed, scaled := ScaledCodes(packed)):
        choose_group(part, layer.step_group or 0)
    found |= {"packed": packed(x), "scaled": scaled(x)}
    layer.unfreeze()
    return found


@pytest.mark.parametrize("pairs", [LOGITS, LOGITS[:1].expand(2, 2)])
def test_every_form_is_that_of_the_pair_of_the_group(pairs):
    """Bit for bit; with equal pairs that is the plain layer in all groups."""
    x, layer = torch.randn(20, D), grouped(pairs)
    with torch.no_grad():
        for group in (0, 1):
            choose_group(layer, group)
            own, alone = forms(layer, x), forms(plain(pairs[group]), x)
            assert all(torch.equal(own[form], alone[form]) for form in alone)
            torch.testing.assert_close(own["frozen"], own["packed"], rtol=1e-5, atol=1e-5)


def test_packed_layers_keep_all_pairs():
    layer = grouped()
    packed = layer.bake()
    assert packed.clip_groups == 2 and torch.equal(packed.act_clip, LOGITS.sigmoid())
    scaled = ScaledCodes(packed)
    scaled.clip.data[1] *= 0.5
    assert torch.equal(scaled.trained()["act_clip"][1], LOGITS[1].sigmoid() * 0.5)


@pytest.mark.parametrize("group", [0, 1])
def test_gradients_reach_the_pair_of_the_group_alone(group):
    layer = grouped()
    for part, pairs in (
        (layer, layer.act_clip_logit),
        (scaled := ScaledCodes(grouped().bake()), scaled.clip),
    ):
        choose_group(part, group)
        part(torch.randn(30, D)).square().sum().backward()
        assert (pairs.grad[group] != 0).all() and (pairs.grad[1 - group] == 0).all()


def test_layers_that_cannot_be_are_refused():
    with pytest.raises(AttarError, match="the step is not known"):
        grouped()(torch.randn(2, D))
    with pytest.raises(AttarError, match="needs activation clipping"):
        QuantizedLinear(linear(), 4, 4, act_clip=False, clip_groups=2)
    with pytest.raises(AttarError, match="bits of 3 groups of steps do not fit clipping of 2"):
        QuantizedLinear(linear(), 4, 8, act_groups=(8, 6, 4), clip_groups=2)
    assert QuantizedLinear(linear(), 4, None, clip_groups=2).group_count is None  # nothing of it is rounded


class Steps:
    """One layer, and samples of early and late steps: early ones have outliers that do not count, late ones have ends
    that do. The scale of a token follows it by itself, so one pair of factors cannot serve both."""

    def __init__(self, seed, shared):
        torch.manual_seed(seed)
        own = nn.Linear(D, OUT, bias=False)
        own.weight.data[:, 0] = 0.0  # what the early outliers meet
        self.samples = []
        for member in [0, 1] * 12:
            x = torch.randn(1, 24, D)
            x[..., 0] = 10.0 * torch.randn(1, 24).abs() if member == 0 else 0.0
            if member == 1:
                x[..., 1] = 10.0 * torch.randn(1, 24).abs()
            with torch.no_grad():
                self.samples.append((BlockCall({"x": x}, group=member), {"y": own(x)}))
        self.layer = QuantizedLinear(own, 8, 3, clip_groups=None if shared else 2)

    def run(self, call):
        choose_group(self.layer, call.group)
        return {"y": self.layer(call.streams["x"])}

    def tuner(self, settings, **options):
        parts = [call.group for call, _ in self.samples]
        return Finetuner(self.run, self.samples, {"layer": self.layer}, settings, parts=parts, **options)

    @torch.no_grad()
    def error(self):
        return sum(float((self.run(c)["y"] - t["y"]).square().mean()) for c, t in self.samples)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_by_group_beat_a_shared_one_where_inputs_change_over_the_steps(seed):
    errors = {}
    for shared in (True, False):
        toy = Steps(seed, shared)
        toy.tuner(FinetuneSettings(steps=150, batch_size=4, clip_lr=0.2)).train()
        errors[shared] = toy.error()
    assert errors[False] < 0.8 * errors[True]


def test_batches_hold_one_group_each_in_proportion_and_in_an_order_of_their_epoch():
    toy = Steps(0, False)
    parts = [0] * 16 + [1] * 8
    settings = replace(WEIGHTS, batch_size=4)

    def places(seed):
        tuner = Finetuner(toy.run, toy.samples, {"layer": toy.layer}, settings, seed, parts=parts)
        for tuner.step in range(12):
            yield tuple(tuner._places())

    found = list(places("0"))
    assert found == list(places("0")) and found != list(places("1"))
    for epoch in (found[:6], found[6:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(24))
        groups = [{parts[i] for i in batch} for batch in epoch]
        assert Counter(map(min, groups)) == {0: 4, 1: 2} and all(len(own) == 1 for own in groups)
    assert found[:6] != found[6:]
    with pytest.raises(AttarError, match="several groups of steps"):
        Finetuner(toy.run, toy.samples, {"layer": toy.layer}, settings, groups=[[15, 16]], parts=parts)


@pytest.mark.parametrize("how", ["end to end", "block by block"])
def test_no_step_moves_the_pair_of_another_group(how):
    """Adam's moments would: each pair is trained in the steps of its group, bit for bit, and in those it moves."""
    toy, seen = Steps(0, False), []

    def run(call):
        if torch.is_grad_enabled():
            seen.append((call.group, toy.layer.act_clip_logit.detach().clone()))
        return toy.run(call)

    if how == "end to end":
        settings = FinetuneSettings(steps=20, batch_size=1, clip_lr=0.1)
        parts = [call.group for call, _ in toy.samples]
        Finetuner(run, toy.samples, {"layer": toy.layer}, settings, parts=parts).train()
    else:
        calls, targets = zip(*toy.samples, strict=True)
        reconstruct_block(
            run, calls, targets, parameter_groups([toy.layer]), ReconstructionSettings(epochs=1),
            loss=lambda y, target, _: mse(y, target), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    assert len(seen) >= 20 and {group for group, _ in seen} == {0, 1}
    for (group, before), (_, after) in itertools.pairwise(seen):
        assert torch.equal(before[1 - group], after[1 - group]) and not torch.equal(
            before[group], after[group]
        )


def test_rows_without_a_gradient_keep_their_moments():
    """As if the steps of other rows had not been: but for the bias correction, which counts all of them."""
    rows = [nn.Parameter(torch.zeros(n, 2)) for n in (2, 1)]
    both, alone = (torch.optim.AdamW([p], lr=0.1, fused=True, weight_decay=0.0) for p in rows)
    keep_unused_rows(both, rows[:1])
    for k in range(6):
        gradient = torch.tensor([1.0 + k, -2.0])
        rows[0].grad = torch.zeros(2, 2)
        rows[0].grad[k % 2] = gradient
        both.step()
        if k % 2:
            rows[1].grad = gradient[None]
            alone.step()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(both.state[rows[0]][name][1:], alone.state[rows[1]][name])
    assert (rows[0][1].sign() == rows[1][0].sign()).all()


def test_a_stopped_run_goes_on_to_the_same_bits():
    settings = FinetuneSettings(steps=14, batch_size=4, clip_lr=0.1)
    whole, first, second = (Steps(0, False) for _ in range(3))
    whole.tuner(settings).train()
    stopped, again = first.tuner(settings), second.tuner(settings)
    stopped.train(until=5)
    tensors, rest = stopped.state()
    again.restore({k: v.clone() for k, v in tensors.items()}, rest)
    again.train()
    assert torch.equal(whole.layer.act_clip_logit, second.layer.act_clip_logit)
    assert not torch.equal(*whole.layer.act_clip_logit)
