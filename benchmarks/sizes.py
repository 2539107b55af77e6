"""What a recipe makes of a model's linears, before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from attar.planning import plan_components
from attar.recipe import Recipe
from attar.settings import layer_size


def planned_ratio(components: Mapping[str, nn.Module], recipe: Recipe) -> float:
    """Packed bytes of the quantized linears against bfloat16.

    Where mean bits are the budget, that of these bits in all layers, which a choice does not exceed.
    """
    plain = recipe.model_copy(update={"allocate": None})
    plans = plan_components(components, plain)
    sizes = [layer_size(p, plain) for name in components for p in plans[name] if not p.skipped]
    return sum(s.packed for s in sizes) / sum(s.dense for s in sizes)
