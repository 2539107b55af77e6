from dataclasses import replace

import pytest
import torch
from torch import nn

from attar.errors import AttarError
from attar.losses import mse, streams_token_weighted_mse, token_weights
from attar.models.block import BlockCall
from attar.quantize.batching import concatenate_calls
from attar.quantize.linear import QuantizedLinear, parameter_groups
from attar.quantize.reconstruct import ReconstructionSettings, reconstruct_block
from attar.quantize.transforms import LearnedKronecker, LearnedScale


class Toy:
    """A quantized residual linear, its calls and its full-precision outputs."""

    def __init__(self, samples=6, seed=0):
        torch.manual_seed(seed)
        self.linear = nn.Linear(16, 16)
        size = torch.ones(16)
        size[3] = 20
        transforms = [LearnedScale(torch.rand(16) + 0.5), LearnedKronecker(16)]
        self.layer = QuantizedLinear(self.linear, 4, 4, transforms)
        self.calls = [
            BlockCall({"h": torch.randn(1, 7, 16) * size}, {"shift": torch.randn(1, 16)})
            for _ in range(samples)
        ]
        with torch.no_grad():
            self.targets = [self.run(call, self.linear) for call in self.calls]
        self.groups = parameter_groups([self.layer])

    def run(self, call, layer=None):
        x = call.streams["h"]
        return {"h": x + (layer or self.layer)(x) + call.constants["shift"][:, None]}

    def train(self, loss=lambda p, t, c: mse(p, t), seed=0, **options):
        settings = options.pop("settings", ReconstructionSettings(epochs=4))
        generator = torch.Generator().manual_seed(seed)
        return reconstruct_block(
            self.run, self.calls, self.targets, self.groups, settings, loss, generator=generator, **options
        )

    def state(self):
        return [p.detach().clone() for group in self.groups.values() for p in group]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_training_lowers_the_error_here_and_on_held_out_samples():
    toy, other = Toy(), Toy(samples=9)
    held_out = (other.calls[6:], other.targets[6:], None)
    seen = []
    result = toy.train(validation=held_out, progress=lambda *step: seen.append(step))
    assert result.error_after < 0.9 * result.error_before
    assert result.validation_after < result.validation_before
    assert result.error_after == min(result.history) == result.history[result.best_epoch - 1]
    assert result.steps == 24 and [step[:2] for step in seen] == [(k // 6 + 1, k + 1) for k in range(24)]
    measured = sum(mse(toy.run(c), t).item() for c, t in zip(toy.calls, toy.targets, strict=True)) / 6
    assert measured == pytest.approx(result.error_after, rel=1e-5)
    assert all(p.grad is None for group in toy.groups.values() for p in group)


def test_the_same_seed_gives_the_same_parameters():
    states = []
    for seed in (0, 0, 1):
        toy = Toy()
        toy.train(seed=seed)
        states.append(toy.state())
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_a_run_that_only_gets_worse_ends_where_it_started():
    toy = Toy()
    start = toy.state()
    result = toy.train(settings=ReconstructionSettings(epochs=2, transform_lr=5.0, clip_lr=50.0))
    assert result.rolled_back and result.best_epoch == 0 and len(result.history) == 2
    assert result.error_after == result.error_before < min(result.history)
    assert same(toy.state(), start)


def test_a_loss_that_is_not_finite_rolls_back():
    toy = Toy()
    calls = 0

    def breaks(prediction, target, context):
        nonlocal calls
        calls += torch.is_grad_enabled()
        return mse(prediction, target) * (float("nan") if calls == 9 and torch.is_grad_enabled() else 1)

    result = toy.train(breaks)
    assert result.rolled_back and "step 9 (epoch 2) is nan" in result.stopped
    assert result.best_epoch == 1 and result.steps == 8 and result.error_after == result.history[0]
    measured = sum(mse(toy.run(c), t).item() for c, t in zip(toy.calls, toy.targets, strict=True)) / 6
    assert measured == pytest.approx(result.error_after, rel=1e-5)
    with pytest.raises(AttarError, match="nan before training"):
        toy.train(lambda p, t, c: mse(p, t) * float("nan"))


def test_the_level_of_the_token_weights_does_nothing_only_their_ratio():
    states = []
    for contexts in (None, 0.5, 0.25, "varied"):
        toy = Toy()
        if contexts == "varied":
            weights = [{"h": token_weights(torch.rand(1, 7), low=0.1)} for _ in toy.calls]
        else:
            weights = None if contexts is None else [{"h": torch.full((1, 7), contexts)} for _ in toy.calls]
        loss = streams_token_weighted_mse if weights else (lambda p, t, c: mse(p, t))
        toy.train(loss, contexts=weights, settings=ReconstructionSettings(epochs=1))
        states.append(toy.state())
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(states[0], states[1], strict=True))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(states[0], states[2], strict=True))
    assert not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(states[0], states[3], strict=True))


def test_batches_equal_the_mean_of_their_samples():
    toy = Toy()
    batch = concatenate_calls(toy.calls[:3])
    assert batch.streams["h"].shape == (3, 7, 16) and batch.constants["shift"].shape == (3, 16)
    with torch.no_grad():
        one_by_one = torch.cat([toy.run(c)["h"] for c in toy.calls[:3]])
        assert torch.allclose(toy.run(batch)["h"], one_by_one, atol=1e-5)
    weights = [{"h": token_weights(torch.rand(1, 7))} for _ in toy.calls]
    untrained = ReconstructionSettings(epochs=0)
    single = toy.train(streams_token_weighted_mse, contexts=weights, settings=untrained)
    settings = ReconstructionSettings(epochs=2, batch_size=4)
    batched = toy.train(streams_token_weighted_mse, contexts=weights, settings=settings)
    assert batched.error_before == pytest.approx(single.error_before, rel=1e-5)
    assert batched.steps == 4 and batched.error_after < batched.error_before


def test_calls_that_differ_cannot_be_batched():
    table = torch.randn(7, 4)
    call = BlockCall({"h": torch.zeros(1, 7, 16)}, {"rotary": (table, table), "mask": None, "flag": True})
    joined = concatenate_calls([call, call])
    assert joined.constants["rotary"][0] is table and joined.constants["flag"] is True
    for change in (
        {"flag": False},
        {"rotary": (table, table + 1)},
        {"rotary": (table,)},
        {"mask": table},
        {"more": 1},
    ):
        other = replace(call, constants=call.constants | change)
        for calls in ([call, other], [other, call]):
            with pytest.raises(AttarError, match="cannot be batched"):
                concatenate_calls(calls)
    with pytest.raises(AttarError, match="different shapes"):
        concatenate_calls([call, replace(call, streams={"h": torch.zeros(1, 8, 16)})])


def test_normalised_losses_train_too_and_weight_decay_pulls_to_the_start():
    toy = Toy()
    result = toy.train(settings=ReconstructionSettings(epochs=3, normalise_loss=True))
    assert result.error_after < result.error_before
    distances = []
    for decay in (0.0, 20.0):
        toy = Toy()
        toy.train(settings=ReconstructionSettings(epochs=2, weight_decay=decay))
        distances.append(sum(p.square().sum().item() for p in toy.groups["transform"]))
    assert distances[1] < distances[0]


def test_requests_that_make_no_sense():
    toy = Toy()
    with pytest.raises(AttarError, match="no calibration calls"):
        reconstruct_block(toy.run, [], [], toy.groups, ReconstructionSettings(), mse)
    with pytest.raises(AttarError, match="do not match"):
        reconstruct_block(toy.run, toy.calls, toy.targets[1:], toy.groups, ReconstructionSettings(), mse)
    with pytest.raises(AttarError, match="unknown parameter groups"):
        reconstruct_block(toy.run, toy.calls, toy.targets, {"bias": []}, ReconstructionSettings(), mse)
    with pytest.raises(AttarError):
        ReconstructionSettings(batch_size=0)
    toy.groups = {"transform": [], "clip": []}
    result = toy.train()
    assert result.steps == 0 and result.error_after == result.error_before
