"""Runs that take what they can from an earlier run give the same numbers, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn
from torch.overrides import TorchFunctionMode

from attar.budget.replay import Replay
from attar.quantize.linear import replace_module


def wan():
    block = WanTransformerBlock(48, 96, 4, cross_attn_norm=True)
    angles = torch.rand(1, 10, 1, 6)
    rope = (angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1))
    return block, (torch.randn(1, 10, 48), torch.randn(1, 5, 48), torch.randn(1, 6, 48), rope)


def cogvideox():
    return CogVideoXBlock(48, 4, 12, 16), (torch.randn(1, 10, 48), torch.randn(1, 5, 48), torch.randn(1, 16))


def unet():
    block = ResnetBlock2D(in_channels=16, out_channels=32, temb_channels=8, groups=4)
    return block, (torch.randn(2, 16, 6, 6), torch.randn(2, 8))


class Counting(TorchFunctionMode):
    """How often products and attentions are computed inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (F.linear, F.conv2d, F.scaled_dot_product_attention)
        return func(*args, **(kwargs or {}))


def outputs(block, args):
    found = block(*args)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("case", [wan, cogvideox, unet])
@pytest.mark.parametrize("limit", [0, 10_000, 2**30])
@torch.no_grad()
def test_the_same_numbers(case, limit):
    torch.manual_seed(0)
    block, args = case()
    block.eval()
    layers = {n: m for n, m in block.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    replay = Replay(layers, limit)
    with replay.recorded():
        first = outputs(block, args)
    assert replay.kept <= limit
    computed = []
    for name, layer in layers.items():
        other = type(layer).__new__(type(layer))
        other.__dict__.update(layer.__dict__, _parameters={**layer._parameters})
        other.weight = nn.Parameter(layer.weight * 1.5)
        replace_module(block, name, other)
        alone = outputs(block, args)
        with Counting() as counting, replay.until(name):
            again = outputs(block, args)
        replace_module(block, name, layer)
        assert all(map(torch.equal, again, alone)) and not torch.equal(again[0], first[0])
        computed.append(counting.count)
    if limit == 0:
        assert len(set(computed)) == 1
    elif limit == 2**30:  # a later layer leaves less to compute
        assert min(computed) == 1 and max(computed) > len(layers) // 2


class Overwriting(nn.Module):
    """What the first layer gives is written to, once before and once behind the second one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        y += 1
        z = self.second(y)
        y *= 2
        return y + z


@torch.no_grad()
def test_what_is_written_to_is_computed_again():
    torch.manual_seed(1)
    block, x = Overwriting(), torch.randn(3, 4)
    replay = Replay({"second": block.second})
    with replay.recorded():
        expected = block(x)
    with Counting() as counting, replay.until("second"):
        assert torch.equal(block(x), expected)
    assert counting.count == 2


@torch.no_grad()
def test_what_took_least_goes_first():
    narrow, wide = nn.Linear(4, 8), nn.Linear(64, 8)
    replay = Replay({}, limit=3 * 8 * 4)
    x, y = torch.randn(3, 4), torch.randn(3, 64)
    with replay.recorded():
        narrow(x), wide(y)
    assert replay.kept == 3 * 8 * 4
    assert [r.value is not None for r in replay._results] == [False, True]


class Odd(nn.Module):
    """How else a block may come to its products."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.second = how, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if self.how == "out":
            y = torch.zeros(3, 4)
            torch.matmul(x, self.first.weight.T, out=y)
        elif self.how == "read before it is called":
            y = F.linear(x, self.second.weight)
        elif self.how == "a view is read":
            y = torch.matmul(x, self.second.weight.T)
        elif self.how == "keywords":
            y = F.linear(input=x, weight=self.first.weight, bias=self.first.bias)
        else:
            y = self.second(self.first(x))
        return self.second(y)


@pytest.mark.parametrize(
    "how", ["out", "read before it is called", "a view is read", "keywords", "called twice"]
)
@torch.no_grad()
def test_odd_blocks_give_the_same_numbers(how):
    torch.manual_seed(2)
    block, x = Odd(how), torch.randn(3, 4)
    own, other = block.second, nn.Linear(4, 4)
    replay = Replay({"first": block.first, "second": own})
    with replay.recorded():
        block(x)
    block.second = other
    expected = block(x)
    with replay.until("second"):
        assert torch.equal(block(x), expected)
