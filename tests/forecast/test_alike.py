"""One of several equal blocks is counted for all: the same counts as of a run of each."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from torch import nn
from torch.nn import functional as F

from attar.forecast.alike import Alike
from attar.forecast.counts import count_transformer
from attar.models.tree import map_tensors


@pytest.mark.parametrize("name", sorted(tiny.MODELS))
def test_counts_are_those_of_a_run_of_each_block(name, monkeypatch):
    build, call = tiny.MODELS[name]
    model = build()
    given = map_tensors(call(model), lambda t: t.to("meta"))
    model = model.to("meta")
    once = count_transformer(model, given)
    monkeypatch.setattr(Alike, "watch", lambda *block: nullcontext())
    each = count_transformer(model, given)
    assert once.operations == each.operations and once.blocks == each.blocks
    assert not any("forward" in vars(part) for part in model.modules())


runs = []


class Gated(nn.Module):
    def __init__(self, width=4, act=F.gelu, times=1, own=1, options=()):
        super().__init__()
        self.up = nn.Linear(4, width, device="meta")
        self.act, self.times, self.processor = act, times, SimpleNamespace(own=own)
        self.options = dict(options)

    def forward(self, x, scale=None):
        runs.append(self)
        return self.act(self.up(x))


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        (Gated(), True),
        (Gated(width=8), False),
        (Gated(act=F.silu), False),
        (Gated(times=2), False),
        (Gated(own=2), False),
        (Gated(options={"a": 1}), False),
        (Gated().bfloat16(), False),
    ],
)
def test_blocks_that_differ_are_run(other, alike):
    first, x = Gated(), torch.empty(2, 4, device="meta")
    known = Alike([])
    with known.watch("blocks.0", first, ()), known.watch("blocks.1", other, ()):
        runs.clear()
        first(x)
        result = other(x.to(other.up.weight.dtype))
    assert runs == ([first] if alike else [first, other])
    assert result.shape == (2, other.up.out_features)


def test_other_arguments_and_other_roles_are_run():
    first, second, third = Gated(), Gated(), Gated()
    x, y = (torch.empty(n, 4, device="meta") for n in (2, 3))
    known = Alike([])
    with (
        known.watch("blocks.0", first, ((".up", "ffn.up"),)),
        known.watch("blocks.1", second, ((".up", "ffn.up"),)),
        known.watch("blocks.2", third, ((".up", "attn.q"),)),
    ):
        runs.clear()
        first(x), second(y), second(x), second(x, scale=2), third(x), second(x.t().contiguous().t())
        assert runs == [first, second, second, third, second]
        runs.clear()
        data = torch.ones(1)
        first(x, scale=data), second(x, scale=data)  # what a block makes of data is not known
        assert runs == [first, second]
