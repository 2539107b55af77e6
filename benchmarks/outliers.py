"""digits-video as a large model would have it: a few channels of every block's activations far above the rest."""

from __future__ import annotations

import torch
from torch import nn

CHANNELS = (13, 77, 140, 201)  # of 256
FACTOR = 20.0


@torch.no_grad()
def plant_outliers(transformer: nn.Module) -> None:
    """Enlarges `CHANNELS` of all inputs of attention and feed-forward by `FACTOR`, and undoes it in the next weights.

    transformer: a WanTransformer3DModel with a normed cross-attention, changed in place. What it computes stays the
    same up to rounding errors; what its linears see does not. Systematic outlier channels are what SmoothQuant
    (2211.10438) found in large transformers; a small model hardly has them.
    """
    channels = torch.tensor(CHANNELS)
    project = (
        transformer.condition_embedder.time_proj
    )  # its rows: shift, scale, gate of attention, then of the FFN
    tables = [block.scale_shift_table for block in transformer.blocks]
    width = project.out_features // 6
    for row, start in ((0, 0.0), (1, 1.0), (3, 0.0), (4, 1.0)):  # y = norm · (1 + scale) + shift
        project.weight[row * width + channels] *= FACTOR
        project.bias[row * width + channels] *= FACTOR
        for table in tables:
            table[0, row, channels] = (start + table[0, row, channels]) * FACTOR - start
    for block in transformer.blocks:
        block.norm2.weight[channels] *= FACTOR
        block.norm2.bias[channels] *= FACTOR
        attention, cross = block.attn1, block.attn2
        for linear in (attention.to_q, attention.to_k, attention.to_v, cross.to_q, block.ffn.net[0].proj):
            linear.weight[:, channels] /= FACTOR
