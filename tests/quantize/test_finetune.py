"""End-to-end training of quantized layers: what learns, in which order, and going on after a stop."""

from dataclasses import replace

import pytest
import torch
from support.toy import WEIGHTS, Toy

from attar.errors import AttarError
from attar.quantize.finetune import Finetuner, FinetuneSettings


@pytest.mark.parametrize(
    "settings",
    [
        WEIGHTS,
        replace(WEIGHTS, weight_lr=0.0, adapter_rank=4, adapter_lr=0.05),
        replace(WEIGHTS, weight_lr=0.0, clip_lr=0.05),
        replace(WEIGHTS, weight_lr=0.0, bias_lr=5e-3),
        replace(WEIGHTS, auxiliary_rank=4, auxiliary_lr=1e-3, bias_lr=1e-3, clip_lr=1e-2, schedule="linear"),
    ],
)
def test_training_lowers_the_error(settings):
    toy = Toy()
    before = toy.error()
    toy.tuner(replace(settings, steps=60)).train()
    assert toy.error() < 0.9 * before
    assert all(layer.auxiliary is None for layer in toy.layers.values())


def test_only_what_has_a_rate_changes():
    toy = Toy()
    start = {name: p.detach().clone() for name, p in toy.model.named_parameters()}
    toy.tuner(replace(WEIGHTS, weight_lr=0.0, bias_lr=1e-2), chosen=["2"]).train()
    changed = {name for name, p in toy.model.named_parameters() if not torch.equal(p, start[name])}
    assert changed == {"2.bias"}


def test_the_original_weights_are_not_written_to():
    toy = Toy()
    shared = toy.layers["0"].weight.data
    before = shared.clone()
    toy.tuner().train()
    assert torch.equal(shared, before) and not torch.equal(toy.layers["0"].weight, before)


@pytest.mark.parametrize("stop", [1, 5, 6, 11])
def test_a_stopped_run_goes_on_to_the_same_bits(stop):
    settings = replace(WEIGHTS, auxiliary_rank=4, auxiliary_lr=1e-3, clip_lr=1e-2, adapter_rank=2)
    whole = Toy()
    tuner = whole.tuner(settings)
    tuner.train()
    first, second = Toy(), Toy()

    class Stopped(Exception):
        pass

    def after(tuner, loss):
        if tuner.step == stop:
            raise Stopped

    stopped = first.tuner(settings)
    with pytest.raises(Stopped):
        stopped.train(after)
    tensors, rest = stopped.state()
    again = second.tuner(settings)
    again.restore({k: v.clone() for k, v in tensors.items()}, rest)
    again.train()
    assert again.history == tuner.history
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name


def test_a_state_of_other_parameters_is_refused():
    tensors, rest = Toy().tuner().state()
    with pytest.raises(AttarError, match="other parameters"):
        Toy().tuner(replace(WEIGHTS, bias_lr=1e-3)).restore(tensors, rest)
    with pytest.raises(AttarError, match="other parameters"):
        Toy(width=8).tuner().restore(tensors, rest)


def test_every_epoch_has_all_samples_in_an_order_of_its_own():
    toy = Toy()
    tuner = toy.tuner(replace(WEIGHTS, batch_size=7))
    orders = []
    for step in range(3):
        tuner.step = step
        orders.append(tuner._places())
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    other = toy.tuner(replace(WEIGHTS, batch_size=7), seed="1")
    assert other._places() != orders[0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_rates_rise_and_fall(schedule):
    from attar.quantize.finetune import _factor

    settings = FinetuneSettings(100, schedule=schedule, warmup=0.1)
    factors = [_factor(settings, step) for step in range(100)]
    assert factors[9] == 1.0 and factors[:10] == sorted(factors[:10]) and factors[0] == 0.1
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 0.02
    assert _factor(FinetuneSettings(100), 0) == 1.0


def test_what_cannot_be_trained_is_refused():
    toy = Toy()
    with pytest.raises(AttarError, match="nothing is trained"):
        toy.tuner(FinetuneSettings(5))
    with pytest.raises(AttarError, match="no samples"):
        Finetuner(toy.run, [], toy.layers, WEIGHTS)
    with pytest.raises(AttarError, match="too few for 4 phases"):
        toy.tuner(replace(WEIGHTS, steps=3, auxiliary_rank=8))
    toy.samples[0][1]["y"].fill_(float("nan"))
    tuner = toy.tuner(replace(WEIGHTS, batch_size=7))
    before = tuner.layers["0"].weight.detach().clone()
    with pytest.raises(AttarError, match="the loss at step 1 is nan"):
        tuner.train()
    assert torch.equal(tuner.layers["0"].weight, before)


def test_scale_aware_rates_change_as_many_codes_in_small_layers_as_in_large_ones():
    """EfficientDM, section 3: with one rate for all, layers with large steps never move."""

    def flipped(rates):
        shares = {}
        for size in (0.3, 30.0):
            toy = Toy(bits=4, acts=None, size=1.0)
            layer = toy.layers["0"]
            layer.weight.data *= size
            toy.model[0].bias.data *= size
            before = layer.quantizer.quantize(layer.transformed_weight())[0]
            settings = replace(WEIGHTS, weight_lr=0.0, adapter_rank=8, adapter_lr=rates(size), max_norm=None)
            toy.tuner(replace(settings, steps=20), chosen=["0"]).train()
            shares[size] = (
                (layer.quantizer.quantize(layer.transformed_weight())[0] != before).float().mean().item()
            )
        return shares[0.3], shares[30.0]

    small, large = flipped(lambda size: 0.3)
    assert 1 / 3 < small / large < 3
    step = Toy(bits=4, acts=None).layers["0"].baked_weight()[1].mean().item()
    small, large = flipped(lambda size: 0.09 * 0.3 / size)  # the same rate for both layers
    assert step > 0 and small > 10 * large
