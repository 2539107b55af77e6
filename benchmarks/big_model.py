"""A random pipeline of CogVideoX-5B's real configuration, written shard by shard and never whole in memory.

Its text encoder and autoencoder are small stand-ins of the real classes: neither is what this measures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from attar.assemble import shard_names, split, write_index
from attar.models.components import empty_model

# the published config.json of CogVideoX-5B's transformer
COGVIDEOX_5B: dict[str, Any] = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 64, "dropout": 0.0,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 16, "max_text_seq_length": 226,
    "norm_elementwise_affine": True, "norm_eps": 1e-5, "num_attention_heads": 48, "num_layers": 42,
    "out_channels": 16, "patch_size": 2, "sample_frames": 49, "sample_height": 60, "sample_width": 90,
    "spatial_interpolation_scale": 1.875, "temporal_compression_ratio": 4, "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096, "time_embed_dim": 512, "timestep_activation_fn": "silu",
    "use_rotary_positional_embeddings": True,
}  # fmt: skip
WORDS = ["a", "the", "red", "blue", "fox", "cat", "dog", "runs", "sits", "through", "on", "snow"]
GENERATION = {
    "height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 16, "num_inference_steps": 2,
    "guidance_scale": 6.0,
}  # fmt: skip


def write_model(folder: Path, config: dict[str, Any], shard_bytes: int, seed: int = 0) -> None:
    """Writes the pipeline. config: of the transformer, which is stored in bfloat16."""
    width = config["text_embed_dim"]
    text = T5EncoderModel(
        T5Config(vocab_size=len(WORDS) + 3, d_model=width, d_kv=64, d_ff=128, num_layers=1, num_heads=2)
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, layers_per_block=1, norm_num_groups=2,
        latent_channels=config["in_channels"],
    )  # fmt: skip
    parts = {
        "text_encoder": text,
        "tokenizer": tokenizer(),
        "vae": vae,
        "scheduler": CogVideoXDDIMScheduler(),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    _write_transformer(folder / "transformer", config, shard_bytes, seed)
    index = {"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "CogVideoXTransformer3DModel"]}
    for name, part in parts.items():
        library = "diffusers" if name in ("vae", "scheduler") else "transformers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    (folder / "generation.json").write_text(json.dumps(GENERATION, indent=2))
    (folder / "calibration_prompts.txt").write_text("a red fox runs\nthe blue cat sits on snow\n")


def _write_transformer(folder: Path, config: dict[str, Any], shard_bytes: int, seed: int) -> None:
    folder.mkdir(parents=True)
    content = {"_class_name": "CogVideoXTransformer3DModel", **config}
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    state = empty_model(CogVideoXTransformer3DModel, folder, torch.bfloat16).state_dict()
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    parts = split(kinds, shard_bytes)
    names = shard_names("diffusion_pytorch_model", len(parts))
    generator = torch.Generator().manual_seed(seed)
    for name, keys in zip(names, parts, strict=True):
        save_file({key: _random(kinds[key][1], key, generator) for key in keys}, folder / name)
    if len(parts) > 1:
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        write_index(index, kinds, dict(zip(names, parts, strict=True)))


def _random(shape: tuple[int, ...], key: str, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # norms begin at one, biases at zero
        return torch.full(shape, float(key.endswith("weight")), dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=COGVIDEOX_5B["num_layers"])
    arguments = parser.parse_args()
    write_model(arguments.folder, {**COGVIDEOX_5B, "num_layers": arguments.layers}, 2_000_000_000)
