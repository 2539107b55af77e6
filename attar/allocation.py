"""Bits under a budget for the transformers of a pipeline: every block's sensitivity, one choice, and how it holds.

Blocks are measured one after the other on full-precision inputs, and each result is kept in the workspace, so a killed
run goes on. The objective is the sum of the layers' errors over all blocks. That errors add up is an assumption; the
error of each block with all its layers quantized is measured too, and stands beside the sum.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.budget.choice import Candidate, totals
from attar.budget.plan_file import plan_text, write_plan
from attar.budget.sensitivity import Sensitivity, block_sensitivity, together
from attar.calibration.store import TraceStore
from attar.candidates import bits_of, choose, layers_of, plan_options, with_bits
from attar.errors import AttarError
from attar.models.adapter import Block, ModelAdapter
from attar.models.block import BlockCall, run_block
from attar.models.weights import weights_of
from attar.planning import Plans, model_identity, plan_components
from attar.progress import Progress
from attar.quantize.plan import LayerPlan
from attar.recipe import Recipe
from attar.samples import Calls, catch_samples
from attar.settings import block_settings
from attar.workspace import Workspace

PLAN = "plan.yaml"
RESULT = "allocation.json"
Run = Callable[[BlockCall], dict[str, Tensor]]


@dataclass(frozen=True)
class Allocation:
    """What was chosen, and by what. It travels with the checkpoint.

    linear_bytes, ratio, mean_bits: of the quantized linears. predicted_error: sum over all layers of the error that
    each causes alone; uniform_error: the same with the recipe's own bits in every layer; measured_error: sum over
    blocks with all layers of a block quantized; all before learning. bits: component -> layer -> bits, of the layers
    that were chosen for. sensitivity: component -> layer -> bits -> error. blocks: component -> [block, predicted
    error, measured error].
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

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with these bits in the place of its budget."""
        return with_bits(recipe, self.bits)

    def summary(self) -> str:
        """One line for people."""
        text = (
            f"{self.budget}: {self.mean_bits:.3f} bits on average, linears {self.ratio:.4f}x of bfloat16, "
            f"summed block error {self.predicted_error:.4f} predicted, {self.measured_error:.4f} measured"
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
    options = plan_options(components, recipe)
    parts = {}
    for name, part in components.items():
        calls = _calls(store, name, prompts, recipe.allocate.samples)
        parts[name] = _Component(name, part, recipe, workspace, calls, seed)
    measured = {
        name: part.sensitivity({bits: plans[name] for bits, plans in options.items()}, progress)
        for name, part in parts.items()
    }
    layers = layers_of(options, measured, recipe)
    taken = choose(layers, recipe)
    chosen = {layer.name: candidate for layer, candidate in zip(layers, taken, strict=True)}
    bits = bits_of(options, layers, taken)
    final = plan_components(components, with_bits(recipe, bits))
    errors = {name: part.together(final[name], progress) for name, part in parts.items()}
    blocks = {name: _beside(name, found, chosen) for name, found in errors.items()}
    total = totals(layers, taken)
    result = Allocation(
        recipe.allocate.budget, total.size, round(total.ratio, 6), round(total.bits, 6), total.error,
        math.fsum(layer.uniform.error for layer in layers), math.fsum(e for f in errors.values() for _, e in f),
        bits, {n: {k: {str(b): e for b, e in v.items()} for k, v in m.items()} for n, m in measured.items()}, blocks,
    )  # fmt: skip
    if ranks.is_first():
        write_plan(workspace.folder / PLAN, describe(result, components, recipe, final))
        workspace.write_json(RESULT, asdict(result))
    ranks.barrier()
    return result


def describe(
    allocation: Allocation, components: Mapping[str, nn.Module], recipe: Recipe, plans: Plans
) -> str:
    """The text of the plan file. components: not compressed yet."""
    chosen = {
        "budget": allocation.budget,
        "recipe": f"{recipe.name} {recipe.bits}",
        "mean_bits": round(allocation.mean_bits, 4),
        "linears_against_bf16": round(allocation.ratio, 4),
        "predicted_error": float(f"{allocation.predicted_error:.4g}"),
        "measured_error": float(f"{allocation.measured_error:.4g}"),
        "error_with_the_recipes_bits": float(f"{allocation.uniform_error:.4g}"),
    }
    rows = {}
    for name, bits in allocation.bits.items():
        known = {plan.name: plan for plan in plans[name]}
        rows[name] = [(k, b, _comment(known[k], allocation.sensitivity[name][k])) for k, b in bits.items()]
    return plan_text(model_identity(components), chosen, rows)


def _comment(plan: LayerPlan, errors: Mapping[str, float]) -> str:
    figures = ", ".join(f"{bits}: {error:.1e}" for bits, error in errors.items())
    return f"{plan.role}, {plan.in_features} x {plan.out_features}; error {figures}"


def _calls(store: TraceStore, component: str, prompts: int, count: int) -> list[list[dict[str, Any]]]:
    """This process's samples: steps evenly over those in which the component ran, prompts in turns."""
    ran = [[s for s in range(store.steps(p)) if component in store.components(p, s)] for p in range(prompts)]
    places = [(i % prompts, int((i + 0.5) / count * len(ran[i % prompts]))) for i in range(count)]
    chosen = list(dict.fromkeys((p, ran[p][k]) for p, k in places if ran[p]))
    if len(chosen) < ranks.size():
        raise AttarError(
            f"{len(chosen)} measured steps cannot be shared by {ranks.size()} processes" if chosen
            else "the component did not run in any traced step",
            where=component,
            fix="Measure more samples (allocate.samples), or trace more prompts or steps",
        )  # fmt: skip
    return [store.calls(component, p, s) for p, s in ranks.mine(chosen)]


def _beside(
    component: str, errors: list[tuple[str, float]], chosen: Mapping[str, Candidate]
) -> list[tuple[str, float, float]]:
    """Of each block the sum of its layers' errors, and the error of all together."""
    named = chosen.items()
    return [
        (block, math.fsum(c.error for n, c in named if n.startswith(f"{component}.{block}.")), error)
        for block, error in errors
    ]


class _Component:
    """One transformer, whose blocks are copied, measured and let go one by one. Nothing of it is changed."""

    def __init__(
        self,
        name: str,
        transformer: nn.Module,
        recipe: Recipe,
        workspace: Workspace,
        calls: list[list[dict[str, Any]]],
        seed: int,
    ) -> None:
        self.name, self.transformer, self.seed = name, transformer, seed
        self.workspace, self.calls = workspace, calls
        self.settings = block_settings(recipe)
        self.adapter = ModelAdapter.of(transformer)
        self.weights = weights_of(transformer)

    def sensitivity(self, options: Mapping[int, list[LayerPlan]], progress: Progress) -> Sensitivity:
        """Layer -> bits -> error, of the layers in blocks."""
        count = len(self.adapter.blocks)
        first = ranks.first(partial(self._first_unknown, count))
        with progress.task(f"{self.name}: sensitivity", count) as advance:
            for block, module, run, calls, targets in self._blocks(first):
                planned: dict[str, dict[int, LayerPlan]] = {}
                for plans in options.values():
                    for path, plan in _inside(block, plans).items():
                        planned.setdefault(path, {})[plan.weight_bits or 0] = plan
                found = block_sensitivity(
                    module, planned, run, calls, targets, self.settings, seed=self._seed(block),
                    progress=lambda k, n, block=block: advance(block.index + 0.99 * k / n, f"{block.name} {k} of {n}"),
                )  # fmt: skip
                self._check(block, found)
                if ranks.is_first():
                    self.workspace.write_json(self._file(block.index), found)
                ranks.barrier()
                advance(block.index + 1, block.name)
        known: Sensitivity = {}
        for block in self.adapter.blocks:
            stored = ranks.first(partial(self.workspace.read_json, self._file(block.index)))
            for path, errors in stored.items():
                known[f"{block.name}.{path}"] = {int(bits): error for bits, error in errors.items()}
        return known

    def together(self, plans: list[LayerPlan], progress: Progress) -> list[tuple[str, float]]:
        """(block, error) with all its layers quantized, of every block."""
        found = []
        with progress.task(f"{self.name}: check plan", len(self.adapter.blocks)) as advance:
            for block, module, run, calls, targets in self._blocks(0):
                planned, error = _inside(block, plans), 0.0
                if planned:
                    error = together(
                        module, planned, run, calls, targets, self.settings, seed=self._seed(block)
                    )
                found.append((block.name, error))
                advance(block.index + 1, block.name)
        return found

    def _blocks(self, first: int) -> Iterator[tuple[Block, nn.Module, Run, Calls, list[dict[str, Tensor]]]]:
        """From block `first` on: the block, a float32 copy of it, what runs it, its calls and its outputs."""
        if first == len(self.adapter.blocks):
            return
        self.adapter.observe(ranks.first(lambda: self.calls[0][0]))
        calls: Calls = []
        for segment in self.adapter.segments:
            if segment[-1].index < first:
                continue
            calls = catch_samples(self.transformer, self.adapter, segment[0], self.calls)
            for block in segment:
                with self.weights.opened(block.module):
                    module = copy.deepcopy(block.module).float().requires_grad_(False).eval()
                run = partial(self._run, block, module)
                with torch.no_grad():
                    targets = [run(call) for call in calls]
                if block.index >= first:
                    yield block, module, run, calls, targets
                calls = [call.with_streams(target) for call, target in zip(calls, targets, strict=True)]

    def _run(self, block: Block, module: nn.Module, call: BlockCall) -> dict[str, Tensor]:
        outputs = run_block(module, call.to(self.weights.device), block.outputs)
        return {name: stream.to("cpu") for name, stream in outputs.items()}

    def _first_unknown(self, count: int) -> int:
        return next((i for i in range(count) if not self.workspace.has(self._file(i))), count)

    def _check(self, block: Block, found: Sensitivity) -> None:
        for path, errors in found.items():
            if not all(map(math.isfinite, errors.values())):
                raise AttarError(
                    "the error of a quantized layer is not finite",
                    where=f"{self.name}.{block.name}.{path}",
                    fix="Check the model and its calibration inputs, or skip the layer",
                )

    def _seed(self, block: Block) -> str:
        return f"{self.seed}/{self.name}/{block.name}"  # that of its compression: the same random signs

    def _file(self, index: int) -> str:
        return f"{self.name}/sensitivity-{index:03d}.json"


def _inside(block: Block, plans: list[LayerPlan]) -> dict[str, LayerPlan]:
    """The plans of the block's linears by their names in it, without those that are kept."""
    prefix = f"{block.name}."
    return {p.name.removeprefix(prefix): p for p in plans if p.name.startswith(prefix) and not p.skipped}
