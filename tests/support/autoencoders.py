"""A small autoencoder whose decoder normalises by batches, as some of diffusers' AutoencoderDC do."""

import torch
from diffusers import AutoencoderDC
from torch import nn


def make_autoencoder(seed=0, channels=(8, 16), latent_channels=4):
    """With random weights; its statistics are as they were born."""
    torch.manual_seed(seed)
    stages = len(channels)
    model = AutoencoderDC(
        latent_channels=latent_channels,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=channels, decoder_block_out_channels=channels,
        encoder_layers_per_block=(1,) * stages, decoder_layers_per_block=(1,) * stages,
        encoder_qkv_multiscales=((),) * stages, decoder_qkv_multiscales=((),) * stages,
        decoder_norm_types="batch_norm", decoder_act_fns="relu",
    )  # fmt: skip
    return model.eval()


def latents(count=64, channels=4, side=8, seed=1):
    """Smooth ones with a deviation and a mean of their own in each channel."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, side // 2, side // 2, generator=generator)
    size = torch.linspace(1, 3, channels)[:, None, None]
    return nn.functional.interpolate(coarse, scale_factor=2) * size + size.flip(0) / 2


def trained_decoder(**options):
    """A decoder that has seen `latents` in training mode; nothing but its statistics was trained."""
    decoder = make_autoencoder(**options).decoder
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over batches
    with torch.no_grad():
        decoder.train()(latents())
    return decoder.eval()
