"""U-Nets: latents are called `sample`, (B, C, h, w); the tokens are its pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def token_grid(config: Mapping[str, Any], call: Mapping[str, Any]) -> tuple[int, int, int]:
    height, width = call["sample"].shape[2:]
    return 1, height, width
