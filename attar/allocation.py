"""Bits under a budget for the transformers of a pipeline: every block's sensitivity, one choice, and how it holds.

What is smallest is a sum over layers and blocks (measuring.py says of what). That errors add up is an assumption: the
error of each block with all its layers quantized is measured too, and stands beside the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from torch import nn

from attar import ranks
from attar.budget.amount import Budget
from attar.budget.choice import mean_bits, totals
from attar.budget.plan_file import plan_text, write_plan
from attar.budget.sensitivity import Sensitivity
from attar.calibration.store import TraceStore
from attar.candidates import (
    ActBits,
    act_bits_of,
    act_layers_of,
    act_options,
    bits_of,
    choose,
    choose_inside,
    chosen_options,
    layers_of,
    plan_options,
    with_bits,
)
from attar.measuring import Measuring
from attar.planning import Plans, model_identity, plan_components
from attar.progress import Progress
from attar.quantize.plan import LayerPlan
from attar.recipe import Recipe
from attar.workspace import Workspace

PLAN = "plan.yaml"
RESULT = "allocation.json"
SAME = Budget.parse("same")
ERRORS_OF = {
    "block": "the blocks' outputs",
    "latents": "the final latents, added up over the steps",
    "output": "the decoder's output",
    "metrics": "the final latents, added up over the steps; inside each group by what its metric sees of them",
}


@dataclass(frozen=True)
class Allocation:
    """What was chosen, and by what. It travels with the checkpoint.

    linear_bytes, ratio, mean_bits: of the quantized linears. predicted_error: sum over all layers of the error that
    each causes alone; uniform_error: the same with the recipe's own bits in every layer; measured_error: sum over
    blocks with all layers of a block quantized; all before learning. bits: component -> layer -> bits, of the layers
    that were chosen for. sensitivity: component -> layer -> bits -> error. blocks: component -> [block, predicted
    error, measured error]. objective: see `Allocate`; errors are relative to the final latents, to a decoder's
    output, or to a block's own update. influence: component -> block -> what its weights' error is multiplied with.
    metrics: component -> layer -> the metric that decided inside its group; {} where one error decides.
    acts, act_sensitivity, mean_act_bits: of the activations, where these were chosen too, the mean over
    multiplications. With groups of steps, bits are a list where the groups differ, and each error is a list: what that
    of each group comes to.
    """

    budget: str
    linear_bytes: int
    ratio: float
    mean_bits: float
    predicted_error: float
    uniform_error: float
    measured_error: float
    bits: dict[str, dict[str, int]]
    sensitivity: dict[str, dict[str, dict[str, float]]]
    blocks: dict[str, list[tuple[str, float, float]]]
    objective: str = "block"
    influence: dict[str, dict[str, float]] = field(default_factory=dict)
    acts: ActBits = field(default_factory=dict)
    act_sensitivity: dict[str, dict[str, dict[str, float | list[float]]]] = field(default_factory=dict)
    mean_act_bits: float | None = None
    metrics: dict[str, dict[str, str]] = field(default_factory=dict)

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with these bits in the place of its budget."""
        return with_bits(recipe, self.bits, self.acts)

    def summary(self) -> str:
        """One line for people."""
        acts = "" if self.mean_act_bits is None else f", activations {self.mean_act_bits:.3f}"
        what = {"block": "summed block error", "output": "error of the decoder's output"}.get(
            self.objective, "error of the final latents"
        )
        text = (
            f"{self.budget}: {self.mean_bits:.3f} bits on average{acts}, linears {self.ratio:.4f}x of bfloat16, "
            f"{what} {self.predicted_error:.4g} predicted, {self.measured_error:.4g} measured block by block"
        )
        if min(self.uniform_error, self.predicted_error) <= 0:  # nothing in the blocks is quantized
            return text
        loss = 10 * math.log10(self.predicted_error / self.uniform_error)
        return f"{text}, {loss:+.2f} dB against the recipe's own bits"


def allocate(
    components: Mapping[str, nn.Module],
    recipe: Recipe,
    workspace: Workspace,
    store: TraceStore,
    prompts: int,
    seed: int,
    progress: Progress,
) -> Allocation:
    """Chooses the bits of `recipe.allocate` and writes the plan into the workspace. prompts: how many were traced.

    Raises AttarError where no choice keeps to the budget, or the trace cannot be measured on.
    """
    assert recipe.allocate is not None
    known = ranks.first(lambda: workspace.read_json(RESULT))
    if known is not None:
        return Allocation(**known)
    options, act_plans = plan_options(components, recipe), act_options(components, recipe)
    parts = {}
    for name, part in components.items():
        mine = ({b: plans[name] for b, plans in some.items()} for some in (options, act_plans))
        parts[name] = Measuring(name, part, recipe, workspace, store, prompts, seed, *mine)
    for part in parts.values():
        part.measure(progress)
    measured = {name: part.sensitivity() for name, part in parts.items()}
    layers = layers_of(options, measured, recipe)
    budget = Budget.parse(recipe.allocate.budget)
    taken = choose(layers, budget, recipe.quantize.weights)
    metrics = {name: part.metrics for name, part in parts.items() if part.metrics}
    groups = {f"{name}.{path}": metric for name, of in metrics.items() for path, metric in of.items()}
    if metrics:
        seen = layers_of(options, {name: part.seen() for name, part in parts.items()}, recipe)
        taken = choose_inside(layers, taken, seen, groups, budget.at(recipe.quantize.weights))
    bits = bits_of(options, layers, taken)
    of_acts = {name: part.act_sensitivity() for name, part in parts.items()}
    counts = {name: part.multiplications() for name, part in parts.items()}
    steps = {name: part.steps for name, part in parts.items()}
    act_layers = act_layers_of(act_plans, of_acts, counts, steps, recipe)
    act_taken = choose(act_layers, SAME, recipe.mean_acts) if act_layers else []
    if act_layers and metrics:
        of_acts_seen = {name: part.acts_seen() for name, part in parts.items()}
        act_seen = act_layers_of(act_plans, of_acts_seen, counts, steps, recipe)
        act_taken = choose_inside(act_layers, act_taken, act_seen, groups, SAME.at(recipe.mean_acts))
    acts = act_bits_of(act_plans, act_layers, act_taken)
    chosen = {layer.name: candidate.error for layer, candidate in zip(layers, taken, strict=True)}
    uniform = [layer.uniform.error for layer in layers]
    followed = any(part.followed for part in parts.values())
    for layer, candidate in zip(act_layers, act_taken, strict=True):
        counted = (
            0.0 if followed else layer.uniform.error
        )  # in the weights' error, known with these activations
        chosen[layer.name] += candidate.error - counted
        uniform.append(layer.uniform.error - counted)
    final = plan_components(components, with_bits(recipe, bits, acts))
    errors = {name: part.together(final[name], progress) for name, part in parts.items()}
    total = totals(layers, taken)
    result = Allocation(
        recipe.allocate.budget, total.size, round(total.ratio, 6), round(total.bits, 6), math.fsum(chosen.values()),
        math.fsum(uniform), math.fsum(e for f in errors.values() for _, e in f),
        bits, {name: _texts(found) for name, found in measured.items()},
        {name: _beside(name, found, chosen) for name, found in errors.items()},
        recipe.allocate.objective, {name: part.influence() for name, part in parts.items()},
        acts, {name: _act_texts(found) for name, found in of_acts.items() if found and found[0]},
        round(mean_bits(act_layers, act_taken), 6) if act_layers else None, metrics,
    )  # fmt: skip
    if ranks.is_first():
        write_plan(workspace.folder / PLAN, describe(result, components, recipe, final))
        workspace.write_json(RESULT, asdict(result))
    ranks.barrier()
    return result


def _texts(measured: Sensitivity) -> dict[str, dict[str, float]]:
    return {name: {str(bits): error for bits, error in errors.items()} for name, errors in measured.items()}


def _act_texts(groups: Sequence[Sensitivity]) -> dict[str, dict[str, float | list[float]]]:
    return {
        name: {
            str(bits): errors[bits] if len(groups) == 1 else [group[name][bits] for group in groups]
            for bits in errors
        }
        for name, errors in groups[0].items()
    }


def describe(
    allocation: Allocation, components: Mapping[str, nn.Module], recipe: Recipe, plans: Plans
) -> str:
    """The text of the plan file. components: not compressed yet."""
    chosen = {
        "budget": allocation.budget,
        "recipe": f"{recipe.name} {recipe.bits}",
        "branch_rank": recipe.quantize.branch_rank,
        "mean_bits": round(allocation.mean_bits, 4),
        "mean_act_bits": allocation.mean_act_bits,
        "linears_against_bf16": round(allocation.ratio, 4),
        "errors_of": ERRORS_OF[allocation.objective],
        "predicted_error": float(f"{allocation.predicted_error:.4g}"),
        "measured_error": float(f"{allocation.measured_error:.4g}"),
        "error_with_the_recipes_bits": float(f"{allocation.uniform_error:.4g}"),
    }
    rows = {}
    for name, layers in chosen_options(allocation.bits, allocation.acts).items():
        known, metrics = {plan.name: plan for plan in plans[name]}, allocation.metrics.get(name, {})
        errors = [
            ("error", allocation.sensitivity.get(name, {})),
            ("acts", allocation.act_sensitivity.get(name, {})),
        ]
        rows[name] = [
            (k, options, _comment(known[k], metrics.get(k), errors)) for k, options in layers.items()
        ]
    said = {key: value for key, value in chosen.items() if value is not None}
    return plan_text(model_identity(components), said, rows)


def _comment(
    plan: LayerPlan,
    metric: str | None,
    errors: Sequence[tuple[str, Mapping[str, Mapping[str, float | list[float]]]]],
) -> str:
    figures = [
        f"{what} " + ", ".join(f"{bits}: {_figure(error)}" for bits, error in known[plan.name].items())
        for what, known in errors
        if plan.name in known
    ]
    role = plan.role if metric is None else f"{plan.role} ({metric})"
    return f"{role}, {plan.in_features} x {plan.out_features}; {'; '.join(figures)}"


def _figure(error: float | list[float]) -> str:
    return " / ".join(f"{e:.1e}" for e in (error if isinstance(error, list) else [error]))


def _beside(
    component: str, errors: list[tuple[str, float]], chosen: Mapping[str, float]
) -> list[tuple[str, float, float]]:
    """Of each block the sum of its layers' errors, and the error of all together."""
    named = chosen.items()
    return [
        (block, math.fsum(e for n, e in named if n.startswith(f"{component}.{block}.")), error)
        for block, error in errors
    ]
