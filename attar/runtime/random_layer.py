"""Packed layers to measure with."""

from __future__ import annotations

import torch

from attar.runtime.layers import PackedLinear


def random_layer(
    in_features: int, out_features: int, weight_bits: int, act_bits: int, dtype: torch.dtype
) -> PackedLinear:
    """Uniformly random codes and scales of one, in a model of `dtype`; no bias, no transforms."""
    most = 1 << (weight_bits - 1)
    codes = torch.randint(-most, most, (out_features, in_features), dtype=torch.int8)
    scale = torch.ones(out_features, 1)
    return PackedLinear.from_codes(codes, scale, weight_bits, act_bits=act_bits, compute_dtype=dtype)
