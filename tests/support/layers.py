"""Packed layers with random content, and what every backend must give for them."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from hypothesis import strategies as st

from attar.runtime import PackedLinear, use_backend
from attar.runtime.formats import integer_range
from attar.runtime.gelu import fuse_gelu
from attar.runtime.transforms import ChannelScale, Hadamard

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
seeds, bits = st.integers(0, 2**31 - 1), st.integers(2, 8)
act_formats = st.sampled_from(["int", "full_range"])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make(
    out_features,
    in_features,
    weight_bits,
    act_bits,
    *,
    seed=0,
    bias=True,
    clip=None,
    chain=(),
    group_size=None,
    act_format="int",
):
    low, high = integer_range(weight_bits)
    codes = torch.randint(
        low, high + 1, (out_features, in_features), generator=generator(seed), dtype=torch.int8
    )
    groups = 1 if group_size is None else in_features // group_size
    size = torch.rand(out_features, groups, generator=generator(seed + 1)) * 0.02 - 0.01
    scale = size + 1e-3 * torch.where(size < 0, -1, 1)  # of both signs
    bias = torch.randn(out_features, generator=generator(seed + 2)) if bias else None
    return PackedLinear.from_codes(
        codes, scale, weight_bits, bias, act_bits, clip, chain, group_size, act_format=act_format
    )


def make_float8(out_features, in_features, acts=True, *, seed=0, bias=True, clip=None, chain=()):
    """A layer of float8 weights, all 254 finite numbers among them, with float8 or floating-point activations."""
    patterns = torch.randint(
        0, 256, (out_features, in_features), generator=generator(seed), dtype=torch.uint8
    )
    patterns[(patterns & 127) == 127] = 0  # NaN
    codes = (patterns ^ 0x80).view(torch.int8)
    scale = torch.rand(out_features, 1, generator=generator(seed + 1)) * 0.01 + 1e-3
    bias = torch.randn(out_features, generator=generator(seed + 2)) if bias else None
    act_bits, act_format = (8, "fp8") if acts else (None, "int")
    return PackedLinear.from_codes(
        codes, scale, 8, bias, act_bits, clip, chain, weight_format="fp8", act_format=act_format
    )


def both(layer, x, backend="cpu"):
    """What the layer gives on a backend, and on the reference."""
    with torch.no_grad(), use_backend("reference"):
        expected = layer(x)
    with torch.no_grad(), use_backend(backend):
        return layer(x), expected


def assert_same(y, expected):
    assert y.dtype == expected.dtype and y.shape == expected.shape
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


def close_to_gelu(layer, x, approximate, backend="cpu"):
    """The GELU of a layer with activation bits, once it is known to be the reference's: within a few roundings of
    float32, and one of the output's type."""
    with torch.no_grad(), use_backend("reference"):
        before, expected = layer(x.float()), layer(x, gelu=approximate)
    with torch.no_grad(), use_backend(backend):
        y = layer(x, gelu=approximate)
    assert y.dtype == expected.dtype == x.dtype
    unit = torch.finfo(x.dtype).eps * expected.float().abs() + torch.finfo(x.dtype).smallest_normal
    bound = 5e-7 * before.abs() + unit  # torch's own and ours are each off by at most 3.2e-7 of the input
    assert ((y.float() - expected.float()).abs() <= bound).all()
    return y


def wan_block():
    """A Wan block with packed layers of every kind, and arguments of one call."""
    torch.manual_seed(0)
    block = WanTransformerBlock(64, 96, 2, "rms_norm_across_heads", True).eval().requires_grad_(False)
    for i, (name, linear) in enumerate(list(block.named_modules())):
        if isinstance(linear, torch.nn.Linear):
            d = linear.in_features
            chain = [ChannelScale(torch.rand(d) + 0.5), Hadamard.random(d, generator(i))][: i % 3]
            block.set_submodule(
                name, make(linear.out_features, d, 4, (6, 8, None)[i % 3], seed=i, chain=chain)
            )
    assert fuse_gelu(block) == 1
    rotary = torch.randn(1, 12, 1, 32), torch.randn(1, 12, 1, 32)
    return block, (torch.randn(1, 12, 64), torch.randn(1, 5, 64), torch.randn(1, 6, 64), rotary)
