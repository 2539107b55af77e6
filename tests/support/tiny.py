"""Tiny random models of the real diffusers classes, and tiny complete Wan pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "fox",
    "runs",
    "through",
    "snow",
    "cat",
    "dog",
    "sits",
    "on",
    "in",
    "digit",
    "moves",
    "left",
    "right",
    "up",
    "down",
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan(**overrides: Any) -> WanTransformer3DModel:
    config = dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=32,
    )
    torch.manual_seed(0)
    return WanTransformer3DModel(**{**config, **overrides}).eval()


def wan_call(model: WanTransformer3DModel, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    return dict(
        hidden_states=randn(batch, model.config.in_channels, 3, 4, 6, seed=seed),
        timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=randn(batch, 5, model.config.text_dim, seed=seed + 1),
    )


def cogvideox(**overrides: Any) -> CogVideoXTransformer3DModel:
    config = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=32,
        num_layers=3,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(**{**config, **overrides}).eval()


def cogvideox_call(model: CogVideoXTransformer3DModel, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    angles = randn(18, model.config.attention_head_dim // 2, seed=9).repeat_interleave(2, dim=1)
    return dict(
        hidden_states=randn(batch, 3, model.config.in_channels, 4, 6, seed=seed),
        encoder_hidden_states=randn(batch, 5, model.config.text_embed_dim, seed=seed + 1),
        timestep=torch.full((batch,), 500),
        image_rotary_emb=(angles.cos(), angles.sin()),
    )


def hunyuan(**overrides: Any) -> HunyuanVideoTransformer3DModel:
    config = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(**{**config, **overrides}).eval()


def hunyuan_call(model: HunyuanVideoTransformer3DModel, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    mask = torch.ones(batch, 5, dtype=torch.long)
    mask[0, 3:] = 0  # the first prompt is shorter: padded text
    return dict(
        hidden_states=randn(batch, model.config.in_channels, 3, 4, 6, seed=seed),
        timestep=torch.full((batch,), 500),
        encoder_hidden_states=randn(batch, 5, model.config.text_embed_dim, seed=seed + 1),
        encoder_attention_mask=mask,
        pooled_projections=randn(batch, model.config.pooled_projection_dim, seed=seed + 2),
        guidance=torch.full((batch,), 6000.0),
    )


def ltx(**overrides: Any) -> LTXVideoTransformer3DModel:
    config = dict(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=32,
    )
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(**{**config, **overrides}).eval()


def ltx_call(model: LTXVideoTransformer3DModel, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    mask = torch.ones(batch, 5, dtype=torch.long)
    mask[0, 3:] = 0
    return dict(
        hidden_states=randn(batch, 18, model.config.in_channels, seed=seed),
        encoder_hidden_states=randn(batch, 5, model.config.caption_channels, seed=seed + 1),
        timestep=torch.full((batch,), 500.0),
        encoder_attention_mask=mask,
        num_frames=3,
        height=2,
        width=3,
    )


def flux(**overrides: Any) -> FluxTransformer2DModel:
    config = dict(
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    torch.manual_seed(0)
    return FluxTransformer2DModel(**{**config, **overrides}).eval()


def flux_call(model: FluxTransformer2DModel, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(3), indexing="ij")
    return dict(
        hidden_states=randn(batch, 12, model.config.in_channels, seed=seed),
        encoder_hidden_states=randn(batch, 5, model.config.joint_attention_dim, seed=seed + 1),
        pooled_projections=randn(batch, model.config.pooled_projection_dim, seed=seed + 2),
        timestep=torch.full((batch,), 0.5),
        img_ids=torch.stack([torch.zeros(12), rows.flatten(), columns.flatten()], dim=1),
        txt_ids=torch.zeros(5, 3),
    )


def pixart(**overrides: Any) -> PixArtTransformer2DModel:
    config = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=32,
        norm_num_groups=1,
        use_additional_conditions=False,
    )
    torch.manual_seed(0)
    return PixArtTransformer2DModel(**{**config, **overrides}).eval()


def pixart_call(model: PixArtTransformer2DModel, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    return dict(
        hidden_states=randn(batch, model.config.in_channels, 8, 8, seed=seed),
        encoder_hidden_states=randn(batch, 5, model.config.caption_channels, seed=seed + 1),
        timestep=torch.full((batch,), 500),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def dit(**overrides: Any) -> DiTTransformer2DModel:
    config = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # DiTPipeline asks for this class where it wants none
    )
    torch.manual_seed(0)
    return DiTTransformer2DModel(**{**config, **overrides}).eval()


def dit_call(model: DiTTransformer2DModel, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    return dict(
        hidden_states=randn(batch, model.config.in_channels, 8, 8, seed=seed),
        timestep=torch.full((batch,), 500),
        class_labels=torch.arange(batch),
    )


# name -> (build(**config overrides), call(model, batch=1, seed=0) -> keyword arguments of one forward)
MODELS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "wan": (wan, wan_call),
    "cogvideox": (cogvideox, cogvideox_call),
    "hunyuan": (hunyuan, hunyuan_call),
    "ltx": (ltx, ltx_call),
    "flux": (flux, flux_call),
    "pixart": (pixart, pixart_call),
    "dit": (dit, dit_call),
}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def wan_pipeline(two_stages: bool = False) -> WanPipeline:
    """A complete random Wan 2.1 pipeline, or the two-stage form of Wan 2.2 with transformer_2."""
    torch.manual_seed(0)
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(WORDS) + 3,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )
    second = wan()
    with torch.no_grad():  # another model than the first
        for parameter in second.parameters():
            parameter.add_(0.01)
    pipe = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan(),
        transformer_2=second if two_stages else None,
        boundary_ratio=0.8 if two_stages else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# arguments of one short generation: latents (1, 4, 3, 4, 8)
GENERATION: dict[str, Any] = dict(height=16, width=32, num_frames=9, max_sequence_length=8)
