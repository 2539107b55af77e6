"""QVGen (arXiv 2505.11497): what the auxiliary branches do to training, and that nothing of them is left."""

from dataclasses import replace

import pytest
import torch
from support.toy import WEIGHTS, Toy

from attar.quantize.rank_decay import decay

LOW = replace(WEIGHTS, steps=70, batch_size=7, weight_lr=1e-3, clip_lr=1e-2, auxiliary_lr=1e-3, max_norm=None)


def trained(seed, **changes):
    """(mean norm of the weights' gradients in the first 50 steps, error at the end) of a toy at W3A3."""
    toy, norms = Toy(bits=3, acts=3, seed=seed, width=32), []

    def after(tuner, loss):
        if tuner.step <= 50:
            norms.append(sum(float(layer.weight.grad.norm()) ** 2 for layer in toy.layers.values()) ** 0.5)

    toy.tuner(replace(LOW, **changes), seed=str(seed)).train(after)
    return sum(norms) / len(norms), toy.error()


def test_the_branch_lowers_the_norm_of_the_gradients():
    with_branch, without = ([trained(seed, auxiliary_rank=rank)[0] for seed in range(3)] for rank in (16, 0))
    assert sum(with_branch) < sum(without)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_what_is_packed_is_what_was_trained_without_the_branch(keep):
    toy = Toy(bits=3, acts=3)
    tuner = toy.tuner(replace(LOW, auxiliary_rank=8, auxiliary_keep=keep))
    tuner.train()
    assert all(layer.auxiliary is None for layer in toy.layers.values())
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        hidden = toy.layers["0"](x)
        packed = toy.layers["0"].bake()
        assert torch.allclose(packed(x), hidden, atol=1e-6)
    assert packed.low_rank == 0


def test_fading_is_continuous_but_for_the_cuts_of_training():
    """From a phase to the next the branch is the same function but for what had faded to nearly nothing."""
    toy = Toy(bits=3, acts=3, width=32)
    tuner = toy.tuner(replace(LOW, auxiliary_rank=8, steps=400))
    layer, schedule = toy.layers["0"], tuner.decay
    for phase in range(1, len(schedule.ranks) - 1):
        step = phase * schedule.length
        decay(toy.layers, schedule, step - 1)
        before = layer.auxiliary().detach()
        decay(toy.layers, schedule, step)
        assert layer.auxiliary.rank == schedule.ranks[phase]
        assert float((layer.auxiliary() - before).norm() / before.norm()) < 2e-3
