"""Tiny random U-Nets of the real diffusers classes, and complete pipelines around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from support import pipelines, tiny
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

PROMPTS = pipelines.PROMPTS
GENERATION: dict[str, Any] = dict(height=16, width=24)  # latents (1, 4, 8, 12)


def condition(**overrides: Any) -> UNet2DConditionModel:
    """As in Stable Diffusion 1.5: one transformer block in each attention, projections that are convolutions."""
    config = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**config, **overrides}).eval()


def condition_call(model: UNet2DConditionModel, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    call: dict[str, Any] = dict(
        sample=tiny.randn(batch, model.config.in_channels, 8, 12, seed=seed),
        timestep=torch.tensor(500),
        encoder_hidden_states=tiny.randn(batch, 5, model.config.cross_attention_dim, seed=seed + 1),
    )
    if model.config.addition_embed_type == "text_time":
        ids, text = torch.tensor([[16, 24, 0, 0, 16, 24]] * batch), tiny.randn(batch, 32, seed=seed + 2)
        call["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
    return call


def condition_xl() -> UNet2DConditionModel:
    """As in Stable Diffusion XL: several transformer blocks in each attention, linear projections."""
    return condition(
        cross_attention_dim=64, transformer_layers_per_block=(2, 1), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip


def unconditional(**overrides: Any) -> UNet2DModel:
    """With attentions that stand alone, and class labels."""
    config = dict(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=4, num_class_embeds=5,
    )  # fmt: skip
    torch.manual_seed(0)
    return UNet2DModel(**{**config, **overrides}).eval()


def unconditional_call(model: UNet2DModel, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    return dict(
        sample=tiny.randn(batch, 3, 8, 12, seed=seed),
        timestep=torch.tensor(500),
        class_labels=torch.arange(batch),
    )


MODELS = {
    "sd": (condition, condition_call),
    "sdxl": (condition_xl, condition_call),
    "unet2d": (unconditional, unconditional_call),
}


def sd_pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=pipelines.image_vae(4), text_encoder=pipelines.clip(), tokenizer=tiny.tokenizer(), unet=condition(),
        scheduler=DDIMScheduler(clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=pipelines.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=32, eos_token_id=1, bos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=pipelines.image_vae(4), text_encoder=pipelines.clip(), tokenizer=tiny.tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(), tokenizer_2=tiny.tokenizer(), unet=condition_xl(),
        scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


PIPELINES = {"sd": sd_pipeline, "sdxl": sdxl_pipeline}


def make(name: str) -> Any:
    pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, seed: int = 3, **options: Any) -> torch.Tensor:
    """The latents of one short generation."""
    with torch.no_grad():
        return pipe(
            prompt=PROMPTS[0], generator=torch.Generator().manual_seed(seed), num_inference_steps=3,
            output_type="latent", return_dict=False, **{**GENERATION, **options},
        )[0]  # fmt: skip


def save(folder: Path, name: str = "sd", pipe: Any = None) -> Path:
    """A pipeline folder as a user has it, with its generation defaults and calibration prompts."""
    (pipe or make(name)).save_pretrained(folder)
    (folder / "generation.json").write_text(
        json.dumps({**GENERATION, "num_inference_steps": 3, "guidance_scale": 4.0})
    )
    (folder / "calibration_prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder
