"""What must be known of a family of models and cannot be derived: one small module for each family.

A family module may define `token_grid(config, call) -> (frames, height, width)`, in tokens of the main
stream, LATENT_LAYOUT, the axes of its video latents where they are not BCFHW, and `example_call(model)`, arguments
of a call on the meta device.
"""

from __future__ import annotations

from types import ModuleType

from torch import nn

from attar.models.families import cogvideox, flux, ltx, unet
from attar.models.units import is_unet

FAMILIES: dict[str, ModuleType] = {
    "ChromaTransformer2DModel": flux,
    "CogVideoXTransformer3DModel": cogvideox,
    "FluxTransformer2DModel": flux,
    "LTXVideoTransformer3DModel": ltx,
    "UNet2DConditionModel": unet,
    "UNet2DModel": unet,
}


def latent_layout(model: nn.Module) -> str:
    """The axes of a denoiser's video latents."""
    return getattr(FAMILIES.get(type(model).__name__), "LATENT_LAYOUT", "BCFHW")


def latents_argument(model: nn.Module) -> str:
    """The argument in which a denoiser gets the latents."""
    return "sample" if is_unet(model) else "hidden_states"
