"""A small autoencoder whose decoder normalises by batches, as some of diffusers' AutoencoderDC do, and its pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from support import tiny
from torch import nn
from transformers import Gemma2Config, Gemma2Model


def make_autoencoder(seed=0, channels=(8, 16), latent_channels=4, blocks="ResBlock", first=1):
    """With random weights; its statistics are as they were born. blocks: of the decoder, one class or one a stage.
    first: blocks of the stage at full resolution; published ones have none."""
    torch.manual_seed(seed)
    stages = len(channels)
    model = AutoencoderDC(
        latent_channels=latent_channels, attention_head_dim=8,
        encoder_block_types="ResBlock", decoder_block_types=blocks,
        encoder_block_out_channels=channels, decoder_block_out_channels=channels,
        encoder_layers_per_block=(first,) + (1,) * (stages - 1),
        decoder_layers_per_block=(first,) + (1,) * (stages - 1),
        encoder_qkv_multiscales=((),) * stages, decoder_qkv_multiscales=((3,),) * stages,
        decoder_norm_types="batch_norm", decoder_act_fns="relu",
    )  # fmt: skip
    return model.eval()


def latents(count=64, channels=4, side=8, seed=1):
    """Smooth ones with a deviation and a mean of their own in each channel."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, side // 2, side // 2, generator=generator)
    size = torch.linspace(1, 3, channels)[:, None, None]
    return nn.functional.interpolate(coarse, scale_factor=2) * size + size.flip(0) / 2


def trained_autoencoder(**options):
    """An autoencoder whose decoder has seen `latents` in training mode; nothing but its statistics was trained."""
    model = make_autoencoder(**options)
    for module in model.decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over batches
    with torch.no_grad():
        model.decoder.train()(latents())
    return model.eval()


def trained_decoder(**options):
    """Its decoder alone."""
    return trained_autoencoder(**options).decoder


def sana_pipeline(vae: nn.Module) -> Any:
    """A Sana pipeline of random weights around an autoencoder of four latent channels."""
    torch.manual_seed(9)
    text = Gemma2Config(
        vocab_size=len(tiny.WORDS) + 3, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=16, num_layers=1,
        num_cross_attention_heads=1, cross_attention_head_dim=16, cross_attention_dim=16, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    pipe = SanaPipeline(
        tokenizer=tiny.tokenizer(), text_encoder=Gemma2Model(text).eval(), vae=vae, transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(folder: Path) -> Path:
    """A Sana pipeline's folder, the decoder of its autoencoder with residual and attention blocks."""
    sana_pipeline(trained_autoencoder(blocks=("ResBlock", "EfficientViTBlock"))).save_pretrained(folder)
    return folder
