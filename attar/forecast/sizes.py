"""What the compressed transformers will weigh, layer by layer: the same for the dry run and for the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attar.quantize.plan import LayerPlan
from attar.recipe import Recipe
from attar.runtime.patches import dense_place
from attar.settings import layer_size


def planned_sizes(
    components: Mapping[str, nn.Module],
    plans: Mapping[str, list[LayerPlan]],
    recipe: Recipe,
    stored: Mapping[str, Mapping[str, torch.dtype]] | None = None,
) -> dict[str, Any]:
    """Exact bytes, but for what shows on data: adaptive rotations, rows with bits of their own, and gates over frames.

    components may be on the meta device.

    "block_linears_*" count the quantized linears with their biases, these and everything else in bfloat16;
    "checkpoint" is what the transformers' files will hold, the floating-point rest in the types of the source
    (`stored`: component -> tensor -> type; default: those the modules have).
    """
    dense = packed = rest = checkpoint = 0
    for name, part in components.items():
        types = (stored or {}).get(name, {})
        quantized = {plan.name: plan for plan in plans[name] if not plan.skipped}
        places = {plan: dense_place(part, plan) for plan in quantized}
        new = dict.fromkeys(places.values(), 0)  # place of a weight -> numbers in the model's type beside it
        for plan in quantized.values():
            size = layer_size(plan, recipe)
            dense, packed = dense + size.dense, packed + size.packed
            checkpoint += size.packed - (2 * plan.out_features if plan.bias else 0)
            new[places[plan.name]] += plan.low_rank * (plan.in_features + plan.out_features)
        for key, tensor in part.state_dict().items():
            layer, _, leaf = key.rpartition(".")
            width = (types.get(key) or tensor.dtype).itemsize
            if layer in new and leaf == "weight":
                checkpoint += new[layer] * (width - 2)
                continue
            checkpoint += tensor.numel() * width
            rest += 0 if layer in new else 2 * tensor.numel()
    return {
        "block_linears_bf16": dense,
        "block_linears_packed": packed,
        "rest_bf16": rest,
        "checkpoint": checkpoint,
        "linear_ratio": round(dense / packed, 3),
        "transformer_ratio": round((dense + rest) / (packed + rest), 3),
    }
