"""The parts of `digits-video`: a text-to-video pipeline of diffusers' Wan classes at a size that a laptop runs."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from attar.models.zoo.clips import FPS, FRAMES, SIZE, all_scenes

TEXT_TOKENS, TEXT_WIDTH, LATENT_CHANNELS = 32, 128, 8
FLOW_SHIFT = 3.0

GENERATION = {  # how the pipeline is meant to be called; written as generation.json beside model_index.json
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "num_inference_steps": 50,
    "guidance_scale": 4.0,
    "max_sequence_length": TEXT_TOKENS,
    "fps": FPS,
}


def build_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer: one piece for each word of the sentences, single characters for everything else."""
    words = sorted({word for scene in all_scenes() for word in scene.prompt.replace(",", " ").split()})
    characters = [chr(code) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [("▁" + word, -3.0) for word in words if len(word) > 1]
    vocab += [(character, -12.0) for character in characters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_TOKENS)


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size, d_model=TEXT_WIDTH, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
        relative_attention_num_buckets=16, relative_attention_max_distance=32, dropout_rate=0.0,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=16, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 4], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[True, True], latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS, scale_factor_temporal=4, scale_factor_spatial=4,
    )  # fmt: skip


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=64, in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, text_dim=TEXT_WIDTH, freq_dim=256, ffn_dim=1024, num_layers=8,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)


def build_pipeline(
    tokenizer: T5Tokenizer,
    text_encoder: UMT5EncoderModel,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
) -> WanPipeline:
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "transformer": transformer}
    pipe = WanPipeline(scheduler=build_scheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encode_prompts(text_encoder: UMT5EncoderModel, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Text states as WanPipeline makes them: padding positions set to zero. ids (B, T) -> (B, tokens, D)."""
    mask = ids != 0
    states = text_encoder(ids, mask.long()).last_hidden_state * mask[..., None]
    return torch.nn.functional.pad(states, (0, 0, 0, tokens - ids.shape[1]))
