"""CogVideoX: latents come frames first, (B, F, C, h, w)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LATENT_LAYOUT = "BFCHW"


def token_grid(config: Mapping[str, Any], call: Mapping[str, Any]) -> tuple[int, int, int]:
    frames, _, height, width = call["hidden_states"].shape[1:]
    patch, patch_t = config["patch_size"], config["patch_size_t"] or 1
    return -(-frames // patch_t), height // patch, width // patch
