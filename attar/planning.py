"""What a recipe plans for the layers of a pipeline's transformers, also with bits from a plan file or other bits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from attar.budget.plan_file import PlanFile
from attar.errors import AttarError
from attar.models.adapter import ModelAdapter
from attar.models.concatenations import concatenations
from attar.quantize.plain import check_plain
from attar.quantize.plan import LayerPlan, check_rotations
from attar.recipe import Recipe
from attar.runtime.layers import packed_layers
from attar.runtime.step_groups import check_takes_timestep
from attar.settings import plan_for, transform_settings

Plans = dict[str, list[LayerPlan]]  # component -> its layers


def plan_components(components: Mapping[str, nn.Module], recipe: Recipe) -> Plans:
    """The plans of all transformers of a pipeline, by component.

    An override's pattern may begin with a component's name ("transformer_2.blocks.0.*") and is for that one then.
    """
    plans = {}
    for name, part in components.items():
        roles: dict[str, Any] = {}
        for pattern, options in recipe.quantize.roles.items():
            owner, dot, rest = pattern.partition(".")
            if not dot or owner not in components:
                roles[pattern] = options
            elif owner == name:
                roles[rest] = options
        plans[name] = plan_component(part, _changed(recipe, roles=roles))
    return plans


def plan_component(transformer: nn.Module, recipe: Recipe) -> list[LayerPlan]:
    """The plan of every linear layer of one transformer.

    Raises AttarError if it is already compressed, for a recipe whose bits are yet to be chosen under a budget, and for
    groups of steps where the model is given no timestep.
    """
    recipe.refuse_budget()
    if recipe.quantize.step_groups > 1:
        check_takes_timestep(transformer)
    adapter = _adapter(transformer)
    if recipe.quantize.split and adapter.unet:  # transformers have no skip connections
        adapter.splits = concatenations(transformer)
    inside = [linear for block in adapter.blocks for linear in adapter.linears(block)]
    plan = plan_for(recipe, inside, adapter.outside_linears())
    check_rotations(plan, transform_settings(recipe))
    if all(layer.skipped for layer in plan):
        raise AttarError(
            "the recipe keeps every layer in full precision", where="quantize.roles", fix="Skip fewer"
        )
    return plan


def with_widths(recipe: Recipe, bits: int) -> Recipe:
    """The recipe with so many bits for the weights that it does not name itself, and without a budget."""
    return _changed(_without_budget(recipe), weights=bits)


def with_act_widths(recipe: Recipe, bits: int) -> Recipe:
    """The same for the activations, with the branches that the recipe's own bits call for."""
    branch = recipe.quantize.branch
    if branch is not None and branch.acts is not None:
        branch = branch.model_copy(update={"acts": 8})  # whatever a layer gets
    return _changed(_without_budget(recipe), acts=bits, low_rank=branch)


def with_plan(recipe: Recipe, plan: PlanFile, components: Mapping[str, nn.Module]) -> Recipe:
    """The recipe with the layers of a plan file as its last overrides, in the place of a budget.

    Raises AttarError when the plan was made for another model, or beside branches that the recipe does not have.
    """
    plan.check(model_identity(components))
    plan.check_branch(recipe.quantize.branch_rank)
    return with_overrides(recipe, plan.overrides())


def model_identity(components: Mapping[str, nn.Module]) -> dict[str, str]:
    """Component -> what plans are made for: its class, and a hash of the names and shapes of its linears."""
    found = {}
    for name, part in components.items():
        adapter = _adapter(part)
        linears = [
            *(x for block in adapter.blocks for x in adapter.linears(block)),
            *adapter.outside_linears(),
        ]
        shapes = [f"{x.name} {x.module.in_features} {x.module.out_features}" for x in linears]
        found[name] = (
            f"{type(part).__name__} {hashlib.sha256(chr(10).join(shapes).encode()).hexdigest()[:12]}"
        )
    return found


def with_overrides(recipe: Recipe, overrides: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe without its budget, and with these after its own overrides, which they change key by key."""
    roles = {k: v for k, v in recipe.quantize.roles.items() if k not in overrides}
    for pattern, options in overrides.items():
        roles[pattern] = {**recipe.quantize.roles.get(pattern, {}), **options}
    return _changed(_without_budget(recipe), roles=roles)


def _adapter(transformer: nn.Module) -> ModelAdapter:
    if packed_layers(transformer):
        raise AttarError(
            "the model is already compressed",
            where=type(transformer).__name__,
            fix="Start from the full-precision model",
        )
    check_plain(transformer)
    return ModelAdapter.of(transformer)


def _without_budget(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"allocate": None})


def _changed(recipe: Recipe, **settings: Any) -> Recipe:
    return recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update=settings)})
