"""What `digits-dit` and `digits-image` have in common: the autoencoder of their latents, and the noise schedule."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler

from attar.models.zoo.canvas import SIZE

LATENT_CHANNELS, LATENT_SIZE = 4, SIZE // 4


def build_vae() -> AutoencoderKL:
    """4x smaller in both directions. Latents have zero mean and unit variance, so the scaling factor is 1."""
    config: dict[str, Any] = dict(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=8,
        sample_size=SIZE, scaling_factor=1.0, mid_block_add_attention=False,
    )  # fmt: skip
    return AutoencoderKL(**config)


def build_scheduler() -> DDIMScheduler:
    """The cosine schedule with v-prediction, which is well conditioned down to the pure noise that sampling starts
    from (Salimans & Ho, arXiv 2202.00512; trailing steps: Lin et al., arXiv 2305.08891)."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing",
        clip_sample=False, set_alpha_to_one=True, steps_offset=1,
    )  # fmt: skip
