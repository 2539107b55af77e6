"""Times are taken in turns and compared round by round."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attar.bench.parts import timing_parts
from attar.bench.timing import faster, interleave
from attar.errors import AttarError

SECONDS = st.lists(st.floats(0.001, 10), min_size=3, max_size=9)


def test_every_round_runs_everything_once_in_turning_order():
    seen = []
    seconds = interleave({name: lambda name=name: seen.append(name) for name in "abc"}, rounds=3)
    assert "".join(seen) == "abc" + "bca" + "cab" + "abc"  # the first round warms up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_seconds_are_those_of_the_run():
    seconds = interleave({"long": lambda: time.sleep(0.02), "short": lambda: None}, rounds=3)
    assert min(seconds["long"]) >= 0.02 > max(seconds["short"])


def test_too_few_rounds_are_refused():
    with pytest.raises(AttarError, match="2 rounds"):
        interleave({"a": lambda: None}, rounds=2)


@given(SECONDS, st.floats(0.1, 10))
def test_a_constant_factor_is_found_with_no_spread(baseline, factor):
    ratio = faster(baseline, [s / factor for s in baseline])
    assert ratio.value == pytest.approx(factor)
    assert (ratio.low, ratio.high) == pytest.approx((factor, factor))


def test_rounds_that_do_not_pair_are_refused():
    with pytest.raises(AttarError, match="cannot be paired"):
        faster([1.0, 2.0, 3.0], [1.0])


class Sleeper(nn.Module):
    def __init__(self, seconds, inside=None):
        super().__init__()
        self.seconds, self.inside = seconds, inside

    def forward(self, x):
        time.sleep(self.seconds)
        return x if self.inside is None else self.inside(x)


def test_parts_are_counted_without_the_parts_inside_them():
    model = Sleeper(0.01, inside=Sleeper(0.02, inside=Sleeper(0.04)))
    with timing_parts(model, {"inside": "outer", "inside.inside": "inner"}) as seconds:
        model(torch.zeros(1))
        model(torch.zeros(1))
    for name, expected in (("rest", 0.02), ("outer", 0.04), ("inner", 0.08)):
        assert expected <= seconds[name] < expected + 0.03
    seconds.clear()
    model(torch.zeros(1))
    assert not seconds  # the clocks are gone
