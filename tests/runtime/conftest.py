"""A tiny Wan transformer with packed blocks, and one call of it."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from attar.runtime.diffusers_integration import mark_compressed, save_transformer
from attar.runtime.layers import PackedLinear
from attar.runtime.reference import quantize, symmetric_scale
from attar.runtime.transforms import ChannelScale, Hadamard, Kronecker, transform_weight


def build_wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        patch_size=(1, 2, 2),
    ).eval()


def quantize_linear(linear, bits: int, act_bits: int | None, transforms=(), clip=None) -> PackedLinear:
    """Round-to-nearest packed layer of one linear."""
    weight = transform_weight(transforms, linear.weight.detach())
    scale = symmetric_scale(weight.abs().amax(1, keepdim=True), bits).float()
    bias = None if linear.bias is None else linear.bias.detach()
    codes = quantize(weight, scale, bits)
    dtype = linear.weight.dtype
    return PackedLinear.from_codes(codes, scale, bits, bias, act_bits, clip, transforms, compute_dtype=dtype)


def pack_blocks(model: WanTransformer3DModel) -> WanTransformer3DModel:
    """Weight-only attention, W4A6 feed-forward, W5A8 attention outputs, with several transforms."""
    generator = torch.Generator().manual_seed(1)
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or not name.startswith("blocks."):
            continue
        d = linear.in_features
        scale = ChannelScale(torch.rand(d, generator=generator) + 0.5)
        if "ffn" in name:
            layer = quantize_linear(linear, 4, 6, [scale, Hadamard.random(d, generator)], (0.97, 0.98))
        elif "to_out" in name:
            left = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
            layer = quantize_linear(linear, 5, 8, [scale, Kronecker(left, torch.eye(8) * 1.5)])
        else:
            layer = quantize_linear(linear, 6, None)
        model.set_submodule(name, layer)
    return model


@pytest.fixture(scope="session")
def call() -> dict:
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
        "return_dict": False,
    }


@pytest.fixture(scope="session")
def packed_wan() -> WanTransformer3DModel:
    return mark_compressed(pack_blocks(build_wan()), "test")  # type: ignore[return-value]


@pytest.fixture(scope="session")
def expected(packed_wan, call) -> torch.Tensor:
    with torch.no_grad():
        return packed_wan(**call)[0]


@pytest.fixture(scope="session")
def saved(packed_wan, tmp_path_factory):
    """A folder with the packed model under `transformer/`. Read-only."""
    folder = tmp_path_factory.mktemp("saved")
    save_transformer(packed_wan, folder / "transformer", recipe="test")
    return folder
