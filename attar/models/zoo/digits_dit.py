"""The parts of `digits-dit`: a class-conditional image pipeline of diffusers' DiT classes at a laptop's size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from torch import nn

from attar.models.zoo.picture_parts import LATENT_CHANNELS, LATENT_SIZE, build_scheduler
from attar.models.zoo.pictures import all_pictures

NO_CLASS = 1000  # DiTPipeline asks for this class where it wants none
ID2LABEL = {number: picture.label for number, picture in enumerate(all_pictures())}

GENERATION = {"num_inference_steps": 50, "guidance_scale": 4.0}  # written as generation.json


def build_transformer() -> DiTTransformer2DModel:
    """A DiT with the initialization of its paper (Peebles & Xie, arXiv 2212.09748): each block starts as identity."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, num_layers=8, sample_size=LATENT_SIZE, patch_size=1,
        in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_embeds_ada_norm=NO_CLASS,
    )  # fmt: skip
    with torch.no_grad():
        for module in transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                module.weight[len(ID2LABEL) : NO_CLASS] = 0  # classes that do not exist
        nn.init.xavier_uniform_(transformer.pos_embed.proj.weight.flatten(1))
        blocks: Any = transformer.transformer_blocks
        for block in blocks:
            nn.init.zeros_(block.norm1.linear.weight)
        for last in (transformer.proj_out_1, transformer.proj_out_2):
            nn.init.zeros_(last.weight)
    # in training mode each block would drop the class by a draw of its own, and never all of them together
    return transformer.eval()


def build_pipeline(vae: AutoencoderKL, transformer: DiTTransformer2DModel) -> DiTPipeline:
    scheduler: Any = build_scheduler()
    pipe = DiTPipeline(transformer, vae, scheduler, id2label=ID2LABEL)
    pipe.register_to_config(
        id2label=ID2LABEL
    )  # diffusers reads the labels from model_index.json, yet writes none
    pipe.set_progress_bar_config(disable=True)
    return pipe
