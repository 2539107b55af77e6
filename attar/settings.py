"""The plain settings of quantization that a recipe stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from attar.quantize.block_settings import BlockSettings
from attar.quantize.finetune import FinetuneSettings
from attar.quantize.initialize import TransformSettings
from attar.quantize.low_rank import LowRankSettings
from attar.quantize.plan import Forecast, LayerPlan, NamedLinear, Rules, forecast, plan_layers
from attar.quantize.reconstruct import ReconstructionSettings
from attar.quantize.relations import RelationSettings
from attar.quantize.row_bits import RowBitsSettings
from attar.recipe import Recipe


def transform_settings(recipe: Recipe) -> TransformSettings:
    """Of the equivalent transforms of one layer."""
    q = recipe.quantize
    return TransformSettings(
        q.scale,
        q.alpha,
        q.rotation,
        q.affine,
        q.rotation_init,
        q.order,
        q.rotation_threshold,
        q.shift,
    )


def plan_for(
    recipe: Recipe, inside: Iterable[NamedLinear], outside: Iterable[NamedLinear]
) -> list[LayerPlan]:
    """The plan of every linear layer, in blocks and outside of them (see `plan_layers`)."""
    q = recipe.quantize
    rules = Rules(
        weights=q.weights, acts=q.acts, overrides=q.roles, group_size=q.group_size, weight_format=q.weight_format,
        act_format=q.act_format, low_rank=_low_rank(recipe), row_bits=_row_bits(recipe), step_groups=q.step_groups,
        calibrate_modulation=q.calibrate_modulation,
    )  # fmt: skip
    return plan_layers(inside, outside, rules)


def block_settings(recipe: Recipe) -> BlockSettings:
    """Of one block's quantization."""
    q, r, rounding = recipe.quantize, recipe.reconstruct, recipe.rounding
    learning = None
    if r is not None and r.epochs:
        learning = ReconstructionSettings(
            epochs=r.epochs, batch_size=r.batch_size, transform_lr=r.transform_lr, clip_lr=r.clip_lr,
            branch_lr=r.branch_lr, level_lr=r.level_lr, eta_min_ratio=r.eta_min_ratio, weight_decay=r.weight_decay,
            normalise_loss=r.normalise_loss,
        )  # fmt: skip
    return BlockSettings(
        transforms=transform_settings(recipe), weight_clip=q.weight_clip, act_clip=q.act_clip,
        clip_groups=q.clip_groups, clip_start=q.clip_start, clip_search=q.clip_search, stats_ema=q.stats_ema,
        learning=learning,
        train_scale=r is not None and r.train_scale, train_rotation=r is not None and r.train_rotation,
        train_clip=r is not None and r.train_clip, train_levels=recipe.trains_levels,
        train_branch=r is not None and r.train_branch,
        low_rank=_low_rank(recipe),
        row_bits=_row_bits(recipe),
        gptq_damping=rounding.damping if rounding.method == "gptq" else None, gptq_block=rounding.block,
        gptq_whole=rounding.target == "weight", gptq_by_activation=rounding.order == "activation",
        rounding=_rounding(recipe), round_weights=r is None or r.round_weights,
    )  # fmt: skip


def has_groups(plans: Iterable[LayerPlan], settings: BlockSettings) -> bool:
    """Whether any layer tells groups of steps apart, by its bits or its clipping."""
    acts = [plan for plan in plans if not plan.skipped and plan.act_bits is not None]
    return any(settings.clip_groups is not None or plan.act_groups is not None for plan in acts)


def _rounding(recipe: Recipe) -> ReconstructionSettings | None:
    """Of codes that are learned."""
    rounding, r = recipe.rounding, recipe.reconstruct
    if not rounding.epochs:
        return None
    return ReconstructionSettings(
        epochs=rounding.epochs, batch_size=1 if r is None else r.batch_size, code_lr=rounding.lr,
        scale_lr=rounding.scale_lr, normalise_loss=True,
    )  # fmt: skip


def _low_rank(recipe: Recipe) -> LowRankSettings | None:
    branch = recipe.quantize.branch
    return None if branch is None else branch.settings()


def _row_bits(recipe: Recipe) -> RowBitsSettings | None:
    rows = recipe.quantize.row_bits
    return None if rows is None else RowBitsSettings(**rows.model_dump())


def finetune_settings(recipe: Recipe) -> FinetuneSettings:
    """Of end-to-end training. The recipe has that stage."""
    assert recipe.finetune is not None
    return FinetuneSettings(
        **recipe.finetune.model_dump(
            exclude={"layers", "local", "local_weight", "relation", "gradient_checkpointing"}
        )
    )


def relation_settings(recipe: Recipe) -> RelationSettings | None:
    """Of the relation term of end-to-end training, if there is one."""
    relation = None if recipe.finetune is None else recipe.finetune.relation
    return None if relation is None else RelationSettings(**relation.model_dump())


def layer_size(plan: LayerPlan, recipe: Recipe) -> Forecast:
    """Bytes of one planned layer before and after, exactly."""
    size = forecast(plan, transform_settings(recipe))
    if plan.skipped or plan.act_bits is None:
        return size
    pairs = (recipe.quantize.clip_groups or 1) if recipe.quantize.act_clip else 0
    return dataclasses.replace(size, packed=size.packed + 8 * (pairs - 1))  # two factors each
