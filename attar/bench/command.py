"""From what a user asks `attar bench` for to its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attar.bench.run import bench_model
from attar.bench.subject import bench_blocks, latent_grid, pack_block, packed_blocks
from attar.errors import AttarError
from attar.forecast.architecture import find_architecture
from attar.forecast.calls import text_length
from attar.models.source import find_source, is_compressed, load_pipeline
from attar.recipe import Recipe

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def bench(
    model: str,
    recipe: Recipe,
    tokens: int,
    text_tokens: int | None = None,
    rounds: int = 7,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> dict[str, Any]:
    """Everything that `attar bench` shows, as JSON-able values.

    model: a compressed folder, whose own blocks are measured beside dense ones of the same shapes; or a folder, a
    built-in name or the name of a real shape, whose blocks are packed by the recipe's bits and transforms. tokens: of
    the video in one forward. Raises AttarError for what cannot be measured.
    """
    if tokens < 1:
        raise AttarError(f"{tokens} tokens cannot be measured", where="--tokens", fix="Give at least 1")
    recipe.refuse_autoencoder("the bench")
    folder = Path(model) if is_compressed(Path(model)) else None
    architecture = find_architecture(model, compressed=folder is not None)
    name = next(iter(architecture.transformers))
    text = text_length(architecture, text_tokens)
    blocks = bench_blocks(architecture, latent_grid(architecture, tokens), text, dtype, device)
    if folder is None:
        what = f"{recipe.name} at {recipe.bits}, random weights"
        pairs = [(block, pack_block(block, recipe)) for block in blocks]
    else:
        what = "its own packed blocks"
        packed = packed_blocks(getattr(load_pipeline(find_source(model), dtype=dtype, device=device), name))
        pairs = [(block, packed[block.kind]) for block in blocks]
    return {
        "model": architecture.title if folder is None else model,
        "what": what,
        "tokens": tokens,
        "text_tokens": text,
        "baseline": NAMES[dtype],
        **bench_model(pairs, rounds, device, folder, dtype),
    }
