"""Flux and Chroma: latents come packed, (B, N, C); position ids (N, 3) hold each token's row and column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def token_grid(config: Mapping[str, Any], call: Mapping[str, Any]) -> tuple[int, int, int]:
    ids = call["img_ids"][0] if call["img_ids"].ndim == 3 else call["img_ids"]
    height, width = (int(n) + 1 for n in ids[:, 1:].amax(dim=0))
    return ids.shape[0] // (height * width), height, width
