"""Bits under a budget for the transformers of a pipeline: every block's sensitivity, one choice, and how it holds.

Blocks are measured one after the other on full-precision inputs, and each result is kept in the workspace, so a killed
run goes on. The objective is a sum over layers, blocks and denoising steps. A layer's error in its block's output is
followed into the latents that the step gives, by what an error of that block makes of them; and it counts as a share of
what the recipe's own bits in every layer come to in that step, as steps differ in how large errors are, and the first
ones, where they are smallest, decide as much. That errors add up is an assumption; the error of each block with all its
layers quantized is measured too, and stands beside the sum.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.budget.amount import Budget
from attar.budget.choice import mean_bits, totals
from attar.budget.influence import Step, standing_in
from attar.budget.plan_file import plan_text, write_plan
from attar.budget.sensitivity import Errors, Sensitivity, block_sensitivity, multiplications, together
from attar.calibration.store import TraceStore
from attar.candidates import (
    act_layers_of,
    act_options,
    bits_of,
    choose,
    chosen_options,
    layers_of,
    plan_options,
    with_bits,
)
from attar.errors import AttarError
from attar.models.adapter import Block, ModelAdapter
from attar.models.block import BlockCall, run_block
from attar.models.weights import weights_of
from attar.planning import Plans, model_identity, plan_components
from attar.progress import Progress
from attar.quantize.plan import LayerPlan
from attar.recipe import Recipe
from attar.samples import Calls, catch_owned
from attar.settings import block_settings
from attar.workspace import Workspace

PLAN = "plan.yaml"
RESULT = "allocation.json"
# what is measured of a block, a file each
WEIGHTS, INFLUENCE, ACTS = "weights", "latents", "activations"
Run = Callable[[BlockCall], dict[str, Tensor]]


@dataclass(frozen=True)
class Allocation:
    """What was chosen, and by what. It travels with the checkpoint.

    linear_bytes, ratio, mean_bits: of the quantized linears. predicted_error: sum over all layers of the error that
    each causes alone; uniform_error: the same with the recipe's own bits in every layer; measured_error: sum over
    blocks with all layers of a block quantized; all before learning. bits: component -> layer -> bits, of the layers
    that were chosen for. sensitivity: component -> layer -> bits -> error. blocks: component -> [block, predicted
    error, measured error]. objective: "latents", where 1 is the error of the recipe's own bits in every layer, as far
    as errors add up; or "block", where it is a block's own update. influence: component -> block -> its share of the
    error of the latents with the recipe's own bits. acts, act_sensitivity, mean_act_bits: of the activations, where
    these were chosen too, the mean over multiplications.
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
    acts: dict[str, dict[str, int]] = field(default_factory=dict)
    act_sensitivity: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    mean_act_bits: float | None = None

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with these bits in the place of its budget."""
        return with_bits(recipe, self.bits, self.acts)

    def summary(self) -> str:
        """One line for people."""
        acts = "" if self.mean_act_bits is None else f", activations {self.mean_act_bits:.3f}"
        what = (
            "error of the latents against the recipe's own bits"
            if self.objective == "latents"
            else "summed block error"
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
        places = _places(store, name, prompts, recipe.allocate.samples)
        mine = ({b: plans[name] for b, plans in some.items()} for some in (options, act_plans))
        parts[name] = _Component(name, part, recipe, workspace, store, places, seed, *mine)
    for part in parts.values():
        part.measure(progress)
    measured = {name: part.sensitivity() for name, part in parts.items()}
    layers = layers_of(options, measured, recipe)
    taken = choose(layers, Budget.parse(recipe.allocate.budget), recipe.quantize.weights)
    bits = bits_of(options, layers, taken)
    of_acts = {name: part.act_sensitivity() for name, part in parts.items()}
    counts = {name: part.multiplications() for name, part in parts.items()}
    act_layers = act_layers_of(act_plans, of_acts, counts, recipe)
    act_taken = choose(act_layers, Budget.parse("same"), recipe.quantize.acts)
    acts = bits_of(act_plans, act_layers, act_taken)
    chosen = {layer.name: candidate.error for layer, candidate in zip(layers, taken, strict=True)}
    for layer, candidate in zip(
        act_layers, act_taken, strict=True
    ):  # known with the recipe's own activations
        chosen[layer.name] += candidate.error - layer.uniform.error
    final = plan_components(components, with_bits(recipe, bits, acts))
    errors = {name: part.together(final[name], progress) for name, part in parts.items()}
    total = totals(layers, taken)
    result = Allocation(
        recipe.allocate.budget, total.size, round(total.ratio, 6), round(total.bits, 6), math.fsum(chosen.values()),
        math.fsum(layer.uniform.error for layer in layers), math.fsum(e for f in errors.values() for _, e in f),
        bits, {name: _texts(found) for name, found in measured.items()},
        {name: _beside(name, found, chosen) for name, found in errors.items()},
        recipe.allocate.objective, {name: part.influence() for name, part in parts.items()},
        acts, {name: _texts(found) for name, found in of_acts.items() if found},
        round(mean_bits(act_layers, act_taken), 6) if act_layers else None,
    )  # fmt: skip
    if ranks.is_first():
        write_plan(workspace.folder / PLAN, describe(result, components, recipe, final))
        workspace.write_json(RESULT, asdict(result))
    ranks.barrier()
    return result


def _texts(measured: Sensitivity) -> dict[str, dict[str, float]]:
    return {name: {str(bits): error for bits, error in errors.items()} for name, errors in measured.items()}


def describe(
    allocation: Allocation, components: Mapping[str, nn.Module], recipe: Recipe, plans: Plans
) -> str:
    """The text of the plan file. components: not compressed yet."""
    chosen = {
        "budget": allocation.budget,
        "recipe": f"{recipe.name} {recipe.bits}",
        "mean_bits": round(allocation.mean_bits, 4),
        "mean_act_bits": allocation.mean_act_bits,
        "linears_against_bf16": round(allocation.ratio, 4),
        "errors_of": "the latents that a step gives"
        if allocation.objective == "latents"
        else "the blocks' outputs",
        "predicted_error": float(f"{allocation.predicted_error:.4g}"),
        "measured_error": float(f"{allocation.measured_error:.4g}"),
        "error_with_the_recipes_bits": float(f"{allocation.uniform_error:.4g}"),
    }
    rows = {}
    for name, layers in chosen_options(allocation.bits, allocation.acts).items():
        known = {plan.name: plan for plan in plans[name]}
        errors = [
            ("error", allocation.sensitivity.get(name, {})),
            ("acts", allocation.act_sensitivity.get(name, {})),
        ]
        rows[name] = [(k, options, _comment(known[k], errors)) for k, options in layers.items()]
    said = {key: value for key, value in chosen.items() if value is not None}
    return plan_text(model_identity(components), said, rows)


def _comment(plan: LayerPlan, errors: Sequence[tuple[str, Mapping[str, Mapping[str, float]]]]) -> str:
    figures = [
        f"{what} " + ", ".join(f"{bits}: {error:.1e}" for bits, error in known[plan.name].items())
        for what, known in errors
        if plan.name in known
    ]
    return f"{plan.role}, {plan.in_features} x {plan.out_features}; {'; '.join(figures)}"


def _places(store: TraceStore, component: str, prompts: int, count: int) -> list[tuple[int, int]]:
    """This process's (prompt, step): steps evenly over those in which the component ran, prompts in turns."""
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
    return list(ranks.mine(chosen))


def _latents(store: TraceStore, place: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Those that enter the step, and those that leave it."""
    prompt, step = place
    x, _ = store.latents(prompt)
    return x[step].clone(), x[step + 1].clone()


def _beside(
    component: str, errors: list[tuple[str, float]], chosen: Mapping[str, float]
) -> list[tuple[str, float, float]]:
    """Of each block the sum of its layers' errors, and the error of all together."""
    named = chosen.items()
    return [
        (block, math.fsum(e for n, e in named if n.startswith(f"{component}.{block}.")), error)
        for block, error in errors
    ]


@dataclass(frozen=True)
class _Open:
    """A block that is worked on: a float32 copy of it, what runs it, its calls and its outputs. owners: of the calls of
    all processes, the number of the sample that each is from."""

    block: Block
    module: nn.Module
    run: Run
    calls: Calls
    targets: list[dict[str, Tensor]]
    owners: list[int]

    def by_sample(self, errors: list[float]) -> list[float]:
        """The mean over the calls of each sample."""
        calls: dict[int, list[float]] = {}
        for owner, error in zip(self.owners, errors, strict=True):
            calls.setdefault(owner, []).append(error)
        return [math.fsum(calls[n]) / len(calls[n]) for n in sorted(calls)]


def _weighted(errors: list[float], weights: list[float] | None) -> float:
    if weights is None:
        return math.fsum(errors) / len(errors)
    return math.fsum(e * w for e, w in zip(errors, weights, strict=True))


class _Component:
    """One transformer, whose blocks are copied, measured and let go one by one. Nothing of it is changed."""

    def __init__(
        self,
        name: str,
        transformer: nn.Module,
        recipe: Recipe,
        workspace: Workspace,
        store: TraceStore,
        places: list[tuple[int, int]],
        seed: int,
        options: Mapping[int, list[LayerPlan]],
        act_options: Mapping[int, list[LayerPlan]],
    ) -> None:
        assert recipe.allocate is not None
        self.name, self.transformer, self.seed = name, transformer, seed
        self.workspace = workspace
        self.calls = [store.calls(name, prompt, step) for prompt, step in places]
        self.latents = [_latents(store, place) for place in places]
        self.settings = block_settings(recipe)
        self.adapter = ModelAdapter.of(transformer)
        self.weights = weights_of(transformer)
        self.options, self.act_options = options, act_options
        self.own = options[recipe.quantize.weights]
        kinds = (True, recipe.allocate.objective == "latents", bool(act_options))
        self.kinds = [kind for kind, wanted in zip((WEIGHTS, INFLUENCE, ACTS), kinds, strict=True) if wanted]
        self._steps: list[Step] = []

    def measure(self, progress: Progress) -> None:
        """Puts what is not known yet of every block into the workspace."""
        count = len(self.adapter.blocks)
        first = ranks.first(partial(self._first_unknown, count))
        with progress.task(f"{self.name}: sensitivity", count) as advance:
            for one in self._blocks(first):
                for kind in self.kinds:
                    if ranks.first(partial(self.workspace.has, self._file(kind, one.block.index))):
                        continue
                    found = self._measured(
                        kind, one,
                        lambda k, n, one=one: advance(one.block.index + 0.99 * k / n, f"{one.block.name} {k} of {n}"),
                    )  # fmt: skip
                    if ranks.is_first():
                        self.workspace.write_json(self._file(kind, one.block.index), found)
                    ranks.barrier()
                advance(one.block.index + 1, one.block.name)

    def _measured(self, kind: str, one: _Open, progress: Callable[[int, int], None]) -> Any:
        if kind == INFLUENCE:
            return self._influence(one)
        planned: dict[str, dict[int, LayerPlan]] = {}
        for plans in (self.options if kind == WEIGHTS else self.act_options).values():
            for path, plan in _inside(one.block, plans).items():
                if kind == WEIGHTS:
                    planned.setdefault(path, {})[plan.weight_bits or 0] = plan
                elif plan.act_bits is not None:
                    planned.setdefault(path, {})[plan.act_bits] = plan
        errors = block_sensitivity(
            one.module, planned, one.run, one.calls, one.targets, self.settings, seed=self._seed(one.block),
            weights=kind == WEIGHTS, progress=progress,
        )  # fmt: skip
        self._check(one.block, errors)
        found = {
            path: {bits: one.by_sample(each) for bits, each in of_bits.items()}
            for path, of_bits in errors.items()
        }
        if kind == WEIGHTS:
            return found
        return {
            "errors": found,
            "multiplications": multiplications(one.module, list(planned), one.run, one.calls),
        }

    def _influence(self, one: _Open) -> dict[str, list[float]]:
        """Of every sample the error of the block with the recipe's own bits, and that of the latents by it."""
        planned = _inside(one.block, self.own)
        if not planned:
            nothing = [0.0] * len(ranks.collected(self.calls))
            return {"block": nothing, "latents": nothing}
        module = copy.deepcopy(one.module)
        run = partial(self._run, one.block, module)
        alone = together(
            module, planned, run, one.calls, one.targets, self.settings, seed=self._seed(one.block)
        )
        if not self._steps:
            pairs = zip(self.calls, self.latents, strict=True)
            self._steps = [Step(self.transformer, calls, *latents) for calls, latents in pairs]
        with standing_in(one.block.module, module):
            errors = ranks.collected([step.error(self.transformer) for step in self._steps])
        if not all(map(math.isfinite, errors)):
            raise AttarError(
                "what the model gives is not finite with this block quantized", where=f"{self.name}.{one.block.name}",
                fix="Check the model and its calibration inputs, or set allocate.objective to block",
            )  # fmt: skip
        # the fit's last digits depend on where tensors lie in memory, and a resumed run should choose the same
        return {"block": one.by_sample(alone), "latents": [float(f"{error:.9g}") for error in errors]}

    def influence(self) -> dict[str, float]:
        """Block -> its share of the error that the recipe's own bits make in the latents; {} where nothing was followed
        so far."""
        if INFLUENCE not in self.kinds:
            return {}
        known = {block.name: self._stored(INFLUENCE, block)["latents"] for block in self.adapter.blocks}
        totals = list(map(math.fsum, zip(*known.values(), strict=True)))
        return {
            name: math.fsum(e / t for e, t in zip(errors, totals, strict=True) if t) / len(totals)
            for name, errors in known.items()
        }

    def _weights(self) -> dict[str, list[float] | None]:
        """Block -> what its error counts in every sample; None for the mean over them."""
        if INFLUENCE not in self.kinds:
            return {block.name: None for block in self.adapter.blocks}
        known = {block.name: self._stored(INFLUENCE, block) for block in self.adapter.blocks}
        totals = list(map(math.fsum, zip(*(found["latents"] for found in known.values()), strict=True)))
        return {
            name: [
                reached / (own * total * len(totals)) if own and total else 0.0
                for own, reached, total in zip(found["block"], found["latents"], totals, strict=True)
            ]
            for name, found in known.items()
        }

    def sensitivity(self) -> Sensitivity:
        """Layer -> bits -> error, of the layers in blocks."""
        return self._reaching({block: self._stored(WEIGHTS, block) for block in self.adapter.blocks})

    def act_sensitivity(self) -> Sensitivity:
        """The same for the bits of activations; {} where these are not chosen."""
        if not self.act_options:
            return {}
        return self._reaching({block: self._stored(ACTS, block)["errors"] for block in self.adapter.blocks})

    def multiplications(self) -> dict[str, int]:
        """Layer -> how many there are in all samples."""
        if not self.act_options:
            return {}
        return {
            f"{block.name}.{path}": count
            for block in self.adapter.blocks
            for path, count in self._stored(ACTS, block)["multiplications"].items()
        }

    def _reaching(self, measured: Mapping[Block, Any]) -> Sensitivity:
        weights = self._weights()
        return {
            f"{block.name}.{path}": {
                int(b): _weighted(each, weights[block.name]) for b, each in errors.items()
            }
            for block, layers in measured.items()
            for path, errors in layers.items()
        }

    def _stored(self, kind: str, block: Block) -> Any:
        return ranks.first(partial(self.workspace.read_json, self._file(kind, block.index)))

    def together(self, plans: list[LayerPlan], progress: Progress) -> list[tuple[str, float]]:
        """(block, error) with all its layers quantized, of every block."""
        found, weights = [], self._weights()
        with progress.task(f"{self.name}: check plan", len(self.adapter.blocks)) as advance:
            for one in self._blocks(0):
                planned, error = _inside(one.block, plans), 0.0
                if planned:
                    each = together(
                        one.module, planned, one.run, one.calls, one.targets, self.settings,
                        seed=self._seed(one.block),
                    )  # fmt: skip
                    error = _weighted(one.by_sample(each), weights[one.block.name])
                found.append((one.block.name, error))
                advance(one.block.index + 1, one.block.name)
        return found

    def _blocks(self, first: int) -> Iterator[_Open]:
        """From block `first` on, a float32 copy of each."""
        if first == len(self.adapter.blocks):
            return
        self.adapter.observe(ranks.first(lambda: self.calls[0][0]))
        calls: Calls = []
        for segment in self.adapter.segments:
            if segment[-1].index < first:
                continue
            calls, owners = catch_owned(self.transformer, self.adapter, segment[0], self.calls)
            start = ranks.place(len(self.calls))[0]
            owners = ranks.collected([start + number for number in owners])
            for block in segment:
                with self.weights.opened(block.module):
                    module = copy.deepcopy(block.module).float().requires_grad_(False).eval()
                run = partial(self._run, block, module)
                with torch.no_grad():
                    targets = [run(call) for call in calls]
                if block.index >= first:
                    yield _Open(block, module, run, calls, targets, owners)
                calls = [call.with_streams(target) for call, target in zip(calls, targets, strict=True)]

    def _run(self, block: Block, module: nn.Module, call: BlockCall) -> dict[str, Tensor]:
        outputs = run_block(module, call.to(self.weights.device), block.outputs)
        return {name: stream.to("cpu") for name, stream in outputs.items()}

    def _first_unknown(self, count: int) -> int:
        known = (all(self.workspace.has(self._file(kind, i)) for kind in self.kinds) for i in range(count))
        return next((i for i, whole in enumerate(known) if not whole), count)

    def _check(self, block: Block, found: Errors) -> None:
        for path, errors in found.items():
            if not all(math.isfinite(e) for each in errors.values() for e in each):
                raise AttarError(
                    "the error of a quantized layer is not finite",
                    where=f"{self.name}.{block.name}.{path}",
                    fix="Check the model and its calibration inputs, or skip the layer",
                )

    def _seed(self, block: Block) -> str:
        return f"{self.seed}/{self.name}/{block.name}"  # that of its compression: the same random signs

    def _file(self, kind: str, index: int) -> str:
        return f"{self.name}/{kind}-{index:03d}.json"


def _inside(block: Block, plans: list[LayerPlan]) -> dict[str, LayerPlan]:
    """The plans of the block's linears by their names in it, without those that are kept."""
    prefix = f"{block.name}."
    return {p.name.removeprefix(prefix): p for p in plans if p.name.startswith(prefix) and not p.skipped}
