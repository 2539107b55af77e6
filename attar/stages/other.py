"""What a recipe does beside the denoiser, and where it is from."""

from __future__ import annotations

from pydantic import Field

from attar.stages.base import Stage


class TextEncoder(Stage):
    """Low-bit weights of the linears in the text encoders' layers; activations stay in floating point."""

    weights: int = Field(default=8, ge=2, le=8, description="bits")
    group_size: int | None = Field(
        default=64, ge=1, description="input channels to a scale; null for one scale per output channel"
    )


class Paper(Stage):
    title: str
    url: str
