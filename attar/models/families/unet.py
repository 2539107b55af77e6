"""U-Nets: latents are called `sample`, (B, C, h, w); the tokens are its pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def token_grid(config: Mapping[str, Any], call: Mapping[str, Any]) -> tuple[int, int, int]:
    height, width = call["sample"].shape[2:]
    return 1, height, width


def example_call(model: nn.Module) -> dict[str, Any]:
    """The smallest call of a U-Net on the meta device, read off its configuration."""
    config: Any = model.config
    side = 2 ** len(config["block_out_channels"])

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    call: dict[str, Any] = {
        "sample": empty(1, config["in_channels"], side, side),
        "timestep": torch.zeros((), device="meta"),
    }
    text = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
    if text is not None:
        call["encoder_hidden_states"] = empty(1, 1, text)
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        call["added_cond_kwargs"] = {"text_embeds": empty(1, pooled), "time_ids": empty(1, 6)}
    if getattr(model, "class_embedding", None) is not None:
        kind = config.get("class_embed_type")
        wide = kind in ("projection", "simple_projection")
        labels = empty(1, config["projection_class_embeddings_input_dim"]) if wide else empty(1)
        call["class_labels"] = labels if kind is not None else labels.long()
    return call
