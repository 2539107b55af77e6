"""Which samples a recipe calibrates on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from attar.calibration.score import FEATURES
from attar.calibration.select import POLICIES
from attar.calibration.synthesize import batch_sizes
from attar.stages.base import Stage, one_of


class Trace(Stage):
    """The candidate pool: full-precision generations whose every denoising step is a candidate."""

    prompts: int = Field(default=10, ge=1, description="how many calibration prompts are generated")
    steps: int | None = Field(default=None, ge=1, description="denoising steps; default: the model's own")
    guidance_scale: float | None = Field(default=None, ge=0, description="default: the model's own")


class Select(Stage):
    """Which candidates become calibration samples."""

    policy: str = Field(default="salient", description="see docs/recipes.md")
    count: int = Field(default=40, ge=1, description="calibration samples M")
    features: str = Field(default="latent", description="what C_quant is computed on")
    norm: Literal["spectral", "frobenius"] = Field(default="spectral", description="of C_quant")
    neighbour: Literal["next", "previous"] = Field(
        default="next",
        description="C_diff's x_(t-1): the latents that a step gives, or those that the one before got",
    )
    normalise: Literal["min_max", "rank"] = Field(
        default="min_max", description="both scores before their product; rank is robust to one large value"
    )
    cap_per_prompt: int | None = Field(default=None, ge=1)
    cap_per_step: int | None = Field(default=None, ge=1)

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        return one_of(value, POLICIES)

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: str) -> str:
        return one_of(value, FEATURES)


class Synthesize(Stage):
    """Calibration latents of an autoencoder's decoder, made of the statistics that its normalisation layers keep."""

    by: Literal["inputs", "generator", "noise"] = Field(
        default="inputs",
        description="latents are trained themselves (ZeroQ) or by a generator (Genie); noise of their statistics is a "
        "control",
    )
    count: int = Field(default=64, ge=1, description="latents, each of which is a calibration sample")
    side: int = Field(default=8, ge=1, description="their height and width")
    steps: int | None = Field(
        default=None, ge=1, description="of training; null for 500 or, by a generator, 4000"
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        description="latents that are trained together; their pictures' features lie in memory",
    )
    statistics: Literal["batch", "sample"] = Field(
        default="batch", description="of all latents of a batch together, or of each alone"
    )
    known: bool = Field(
        default=True,
        description="the latents' own mean and deviation are those that the autoencoder's configuration gives",
    )
    swing: int = Field(default=0, ge=0, description="pixels by which strided convolutions swing; 1 in Genie")

    @model_validator(mode="after")
    def _noise_is_not_trained(self) -> Synthesize:
        if self.by == "noise" and not self.known:
            raise ValueError("noise has no other statistics than known ones")
        if self.by == "generator" and min(batch_sizes(self.count, self.batch_size)) < 2:
            raise ValueError(
                "a generator normalises over a batch, and one latent is none: "
                f"a count of {self.count} in batches of {self.batch_size} leaves one alone"
            )
        return self
