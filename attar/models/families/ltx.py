"""LTX-Video: latents come packed, (B, N, C); the call carries the grid as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def token_grid(config: Mapping[str, Any], call: Mapping[str, Any]) -> tuple[int, int, int]:
    # the pipeline has already divided by the patch size when it packed the latents
    return call["num_frames"], call["height"], call["width"]
