"""What the rounding of every layer of a transformer does, measured block by block and kept in the workspace.

Objective "block": the error of the block's output, relative to the block's own update, all blocks alike.

Objective "latents": that error times what the block's errors come to in the final latents. A block is quantized alone,
the model runs on steps of one traced trajectory, and the changes of the latents that these steps give are added up
over the trajectory. Errors of weights are much the same in every step and add up, those of activations differ from step
to step and average out; so the two are followed apart, with the other one left in floating point.

Objective "metrics": the same between groups of layers; inside a group, what its own metric sees of the group's errors.

Objective "output": the error of the block times what its errors come to in what a decoder gives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.budget.influence import Picture, Pictures, Step, Trajectory, standing_in
from attar.budget.metrics import METRICS, Metric, metric_of, parts, video_of
from attar.budget.sensitivity import Sensitivity, block_sensitivity, multiplications, together
from attar.calibration.store import TraceStore
from attar.errors import AttarError
from attar.models.adapter import Block, ModelAdapter
from attar.models.arithmetic import Arithmetic
from attar.models.block import BlockCall
from attar.models.families import latent_layout
from attar.models.weights import weights_of
from attar.progress import Progress
from attar.quantize.block import errors_by_group, mean_error
from attar.quantize.plan import LayerPlan, open_planned
from attar.quantize.wrap import InputFacts, input_facts
from attar.recipe import Recipe
from attar.runtime.step_groups import ARGUMENT, StepGroups, choose_group
from attar.samples import Calls, catch_samples, traced_groups
from attar.settings import block_settings
from attar.synthesis import read_samples
from attar.workspace import Workspace

# what is measured of a block, a file each: errors of weights with activations, of weights, of activations, what errors
# of the block come to, and what those of each group of its layers come to in the group's metric
BOTH, WEIGHTS, ACTS = "sensitivity", "weights", "activations"
REACH = {"reach-of-weights": WEIGHTS, "reach-of-activations": ACTS}
SEEN = {"metrics-of-weights": WEIGHTS, "metrics-of-activations": ACTS}
QUANTIZED = {BOTH: (True, True), WEIGHTS: (True, False), ACTS: (False, True)}  # weights, activations
Run = Callable[[BlockCall], dict[str, Tensor]]
# what the error of a layer, by its name in the block, is multiplied with
Factor = Callable[[Block, str], float]


@dataclass(frozen=True)
class _Open:
    """A block that is worked on: a float32 copy of it, what runs it, its calls and its outputs, and what these calls
    say of its layers' inputs."""

    block: Block
    module: nn.Module
    run: Run
    calls: Calls
    targets: list[dict[str, Tensor]]
    inputs: InputFacts


class Measuring:
    """One transformer, whose blocks are copied, measured and let go one by one. Nothing of it is changed.

    options, act_options: bits -> the plans with these bits of weights, or of activations.
    """

    def __init__(
        self,
        name: str,
        transformer: nn.Module,
        recipe: Recipe,
        workspace: Workspace,
        store: TraceStore,
        prompts: int,
        seed: int,
        options: Mapping[int, list[LayerPlan]],
        act_options: Mapping[int, list[LayerPlan]],
    ) -> None:
        assert recipe.allocate is not None
        self.name, self.transformer, self.seed = name, transformer, seed
        self.workspace, self.store = workspace, store
        self.adapter = ModelAdapter.of(transformer)
        self.followed = recipe.allocate.objective != "block"
        self.groups: StepGroups | None = None
        self.steps = [1]  # of each group of steps, as many as it has
        if recipe.quantize.step_groups > 1:
            self.groups, self.steps = traced_groups(store, name, prompts, recipe.quantize.step_groups)
        self.trajectory, self.places, self.calls = 1, [], []
        count, self.decodes = recipe.allocate.samples, recipe.synthesize is not None
        if self.decodes:
            self.calls = list(ranks.mine(read_samples(name, transformer, workspace)[0][:count]))
        else:
            self.trajectory, self.places = _places(
                store, name, prompts, count, self.followed, recipe.quantize.step_groups
            )
            self.calls = [store.calls(name, prompt, step) for prompt, step in self.places]
        self.adapter.observe(ranks.first(lambda: self.calls[0][0]))  # units come in the order of their calls
        self.settings = block_settings(recipe)
        self.weights = weights_of(transformer)
        self.arithmetic = Arithmetic.of(transformer, recipe.precision)
        self.options, self.act_options = options, act_options
        self.own = options[recipe.quantize.weights]
        chosen = [WEIGHTS if self.followed else BOTH, *([ACTS] if act_options else [])]
        self.kinds = [*chosen, *(name for name, kind in REACH.items() if self.followed and kind in chosen)]
        self.metrics: dict[str, Metric] = {}  # layer -> what it is measured by; none where all are alike
        if recipe.allocate.objective == "metrics":
            self.kinds += [name for name, kind in SEEN.items() if kind in chosen]
            grid = ranks.first(lambda: self.adapter.token_grid(self.calls[0][0]))
            self.grid = (grid.frames, grid.height, grid.width)
            self.metrics = {p.name: metric_of(p.role, grid.frames) for p in self.own if not p.skipped}

    def measure(self, progress: Progress) -> None:
        """Puts what is not known yet of every block into the workspace."""
        count = len(self.adapter.blocks)
        first = ranks.first(partial(self._first_unknown, count))
        with progress.task(f"{self.name}: sensitivity", count) as advance:
            for one in self._blocks(first):
                for kind in self.kinds:
                    if ranks.first(partial(self.workspace.has, self._file(kind, one.block))):
                        continue
                    found = self._measured(
                        kind, one,
                        lambda k, n, one=one: advance(one.block.index + 0.99 * k / n, f"{one.block.name} {k} of {n}"),
                    )  # fmt: skip
                    if ranks.is_first():
                        self.workspace.write_json(self._file(kind, one.block), found)
                    ranks.barrier()
                advance(one.block.index + 1, one.block.name)

    def sensitivity(self) -> Sensitivity:
        """Layer -> bits -> error, of the layers in blocks."""
        if not self.followed:
            return self._named(lambda block: self._stored(BOTH, block))
        return self._named(lambda block: self._stored(WEIGHTS, block), self._reaching(WEIGHTS))

    def act_sensitivity(self) -> list[Sensitivity]:
        """The same for the bits of activations, in each group of steps; [] where these are not chosen.

        Errors are the group's mean times its share of the steps, so those of all groups add up to that of a trajectory.
        What a block's errors come to in the final latents is known of all steps together: that of a group would leave
        out what later steps make of it, which is another thing for each group.
        """
        return self._of_acts(self._reaching(ACTS)) if self.act_options else []

    def seen(self) -> Sensitivity:
        """As `sensitivity`, but what the metric of each layer's group sees of its errors."""
        return self._named(lambda block: self._stored(WEIGHTS, block), self._seeing(WEIGHTS))

    def acts_seen(self) -> list[Sensitivity]:
        """The same of `act_sensitivity`."""
        return self._of_acts(self._seeing(ACTS))

    def multiplications(self) -> dict[str, int]:
        """Layer -> how many there are in all samples; {} where bits of activations are not chosen."""
        if not self.act_options:
            return {}
        return {
            f"{block.name}.{path}": count
            for block in self.adapter.blocks
            for path, count in self._stored(ACTS, block)["multiplications"].items()
        }

    def influence(self, kind: str = WEIGHTS) -> dict[str, float]:
        """Block -> what its error is multiplied with; {} where all blocks count alike."""
        if not self.followed:
            return {}
        known = self._come_to(REACH, kind)
        return {name: e["latents"] / e["block"] if e["block"] else 0.0 for name, e in known.items()}

    def _reaching(self, kind: str) -> Factor:
        reach = self.influence(kind)
        return lambda block, path: reach.get(block.name, 1.0)

    def _seeing(self, kind: str) -> Factor:
        known = self._come_to(SEEN, kind)

        def factor(block: Block, path: str) -> float:
            found = known[block.name][self.metrics[f"{block.name}.{path}"]]
            return found["seen"] / found["block"] if found["block"] else 0.0

        return factor

    def together(self, plans: list[LayerPlan], progress: Progress) -> list[tuple[str, float]]:
        """(block, error) with all its layers quantized, of every block."""
        kinds = [WEIGHTS, *([ACTS] if self.act_options else [])] if self.followed else [BOTH]
        reach = {kind: self.influence(kind) for kind in kinds}
        found = []
        with progress.task(f"{self.name}: check plan", len(self.adapter.blocks)) as advance:
            for one in self._blocks(0):
                planned = _inside(one.block, plans)
                modules = {
                    kind: one.module if kind == kinds[-1] else copy.deepcopy(one.module) for kind in kinds
                }
                errors = [
                    self._together(one, modules[kind], planned, kind) * reach[kind].get(one.block.name, 1.0)
                    for kind in (kinds if planned else [])
                ]  # fmt: skip
                found.append((one.block.name, math.fsum(errors)))
                advance(one.block.index + 1, one.block.name)
        return found

    def _measured(self, kind: str, one: _Open, progress: Callable[[int, int], None]) -> Any:
        if kind in REACH:
            return self._reach(one, REACH[kind])
        if kind in SEEN:
            return self._seen(one, SEEN[kind])
        planned: dict[str, dict[int, LayerPlan]] = {}
        for plans in (self.act_options if kind == ACTS else self.options).values():
            for path, plan in _inside(one.block, plans).items():
                bits = plan.act_bits if kind == ACTS else plan.weight_bits
                if bits is not None:
                    planned.setdefault(path, {})[bits] = plan
        weights, acts = QUANTIZED[kind]
        by_group = partial(errors_by_group, groups=len(self.steps))
        errors = block_sensitivity(
            one.module, planned, one.inputs, one.run, one.calls, one.targets, self.settings, seed=self._seed(one.block),
            weights=weights, acts=acts, progress=progress,
            average=mean_error if kind != ACTS or self.groups is None else by_group,
        )  # fmt: skip
        self._check(one.block, errors)
        if kind != ACTS:
            return errors
        counts = multiplications(one.module, list(planned), one.run, one.calls)
        return {"errors": errors, "multiplications": counts}

    def _reach(self, one: _Open, kind: str) -> dict[str, float]:
        """With the recipe's own bits, the error of the block, and that of the final latents by it."""
        planned = _inside(one.block, self.own)
        if not planned:
            return {"block": 0.0, "latents": 0.0}
        alone, changes = self._changes(one, planned, kind)
        return {"block": alone, "latents": self._share(one, changes)}

    def _seen(self, one: _Open, kind: str) -> dict[Metric, dict[str, float]]:
        """Metric -> with the layers of its group alone at the recipe's own bits, the error of the block, and that of
        the final latents that the metric sees."""
        planned = _inside(one.block, self.own)
        found: dict[Metric, dict[str, float]] = {}
        for metric in METRICS:
            mine = {path: plan for path, plan in planned.items() if self.metrics[plan.name] == metric}
            if not mine:
                continue
            alone, changes = self._changes(one, mine, kind)
            visible = [parts(self._video(change))[metric].flatten() for change in changes]
            found[metric] = {"block": alone, "seen": self._share(one, visible)}
        return found

    def _video(self, latents: Tensor) -> Tensor:
        return video_of(latents.view(self._latents(0)[1].shape), latent_layout(self.transformer), self.grid)

    def _changes(self, one: _Open, planned: Mapping[str, LayerPlan], kind: str) -> tuple[float, list[Tensor]]:
        """The error of the block with these layers quantized, and the change of the latents in every measured step."""
        module = copy.deepcopy(one.module)
        alone = self._together(one, module, planned, kind)
        samples = self._end.samples  # made with the model as it is
        with standing_in(one.block.module, self.arithmetic.bound(module)):
            return alone, ranks.collected([self._change(sample, module) for sample in samples])

    @cached_property
    def _end(self) -> Trajectory | Pictures:
        """Where errors are followed to."""
        if self.decodes:
            pictures = [Picture(self.adapter.entry, sample) for sample in self.calls]
            return Pictures(pictures, math.fsum(ranks.collected([picture.size for picture in pictures])))
        steps = [Step(self.transformer, *self._latents(n)) for n in range(len(self.places))]
        return Trajectory(steps, self.trajectory, self._final())

    def _share(self, one: _Open, changes: list[Tensor]) -> float:
        """What changes come to at the end."""
        error = self._end.error(changes)
        if not math.isfinite(error):
            raise AttarError(
                "what the model gives is not finite with this block quantized",
                where=f"{self.name}.{one.block.name}",
                fix="Check the model and its calibration inputs, or set allocate.objective to block",
            )
        # the fit's last digits depend on where tensors lie in memory, and a resumed run should choose the same
        return float(f"{error:.9g}")

    def _change(self, step: Step | Picture, module: nn.Module) -> Tensor:
        if self.groups is not None:
            choose_group(module, self.groups.group(step.sample[0].get(ARGUMENT)))
        return step.change(self.adapter.entry)

    def _together(
        self,
        one: _Open,
        module: nn.Module,
        planned: Mapping[str, LayerPlan],
        kind: str,
    ) -> float:
        weights, acts = QUANTIZED[kind]
        return together(
            module, planned, one.inputs, partial(self._run, one.block, module), one.calls, one.targets, self.settings,
            seed=self._seed(one.block), weights=weights, acts=acts,
        )  # fmt: skip

    def _latents(self, number: int) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
        """The calls of a sample, the latents that enter its step, and those that leave it."""
        prompt, step = self.places[number]
        x, _ = self.store.latents(prompt)
        return self.calls[number], x[step].clone(), x[step + 1].clone()

    def _final(self) -> float:
        prompt = ranks.first(lambda: self.places[0][0])
        return self.store.latents(prompt)[0][-1].double().square().sum().item()

    def _named(self, errors: Callable[[Block], Any], factor: Factor = lambda block, path: 1.0) -> Sensitivity:
        return {
            f"{block.name}.{path}": {int(bits): e * factor(block, path) for bits, e in of_bits.items()}
            for block in self.adapter.blocks
            for path, of_bits in errors(block).items()
        }

    def _of_acts(self, factor: Factor) -> list[Sensitivity]:
        """In each group of steps."""
        stored = {block.name: self._stored(ACTS, block)["errors"] for block in self.adapter.blocks}
        if self.groups is None:
            return [self._named(lambda block: stored[block.name], factor)]
        whole = sum(self.steps)

        def share(block: Block, group: int) -> dict[str, dict[int, float]]:
            of_steps = self.steps[group] / whole
            return {
                path: {bits: e[group] * of_steps for bits, e in found.items()}
                for path, found in stored[block.name].items()
            }

        return [self._named(partial(share, group=group), factor) for group in range(len(self.steps))]

    def _come_to(self, files: Mapping[str, str], kind: str) -> dict[str, Any]:
        """Block -> what is stored of it in that one of `files` which is about errors of this kind."""
        file = next(name for name, other in files.items() if other == kind)
        return {block.name: self._stored(file, block) for block in self.adapter.blocks}

    def _stored(self, kind: str, block: Block) -> Any:
        return ranks.first(partial(self.workspace.read_json, self._file(kind, block)))

    def _blocks(self, first: int) -> Iterator[_Open]:
        """From block `first` on, a float32 copy of each."""
        if first == len(self.adapter.blocks):
            return
        calls: Calls = []
        for segment in self.adapter.segments:
            if segment[-1].index < first:
                continue
            calls = catch_samples(
                self.transformer, self.adapter, segment[0], self.calls, self.groups, self.workspace.hold
            )
            for block in segment:
                with self.weights.opened(block.module):
                    module = copy.deepcopy(block.module).float().requires_grad_(False).eval()
                run = partial(self._run, block, module)
                with torch.no_grad():
                    targets = [self.workspace.hold(run(call)) for call in calls]
                if block.index >= first:
                    yield _Open(block, module, run, calls, targets, self._inputs(block, module, run, calls))
                calls = [call.with_streams(target) for call, target in zip(calls, targets, strict=True)]

    def _inputs(self, block: Block, module: nn.Module, run: Run, calls: Calls) -> InputFacts:
        planned = _inside(block, self.own)
        open_planned(module, planned)
        linears = {name: module.get_submodule(name) for name in planned}
        return input_facts(planned, linears, run, calls, self.settings, self._seed(block))

    def _run(self, block: Block, module: nn.Module, call: BlockCall) -> dict[str, Tensor]:
        if call.group is not None:
            choose_group(module, call.group)
        outputs = self.arithmetic.run(module, call, block.outputs)
        return {name: stream.to("cpu") for name, stream in outputs.items()}

    def _first_unknown(self, count: int) -> int:
        blocks = self.adapter.blocks
        known = (all(self.workspace.has(self._file(kind, block)) for kind in self.kinds) for block in blocks)
        return next((i for i, whole in enumerate(known) if not whole), count)

    def _check(self, block: Block, found: dict[str, dict[int, Any]]) -> None:
        for path, errors in found.items():
            flat = [e for some in errors.values() for e in (some if isinstance(some, list) else [some])]
            if not all(map(math.isfinite, flat)):
                raise AttarError(
                    "the error of a quantized layer is not finite",
                    where=f"{self.name}.{block.name}.{path}",
                    fix="Check the model and its calibration inputs, or skip the layer",
                )

    def _seed(self, block: Block) -> str:
        return f"{self.seed}/{self.name}/{block.name}"  # that of its compression: the same random signs

    def _file(self, kind: str, block: Block) -> str:
        return f"{self.name}/{kind}-{block.index:03d}.json"


def _places(
    store: TraceStore, component: str, prompts: int, count: int, one_trajectory: bool, groups: int
) -> tuple[int, list[tuple[int, int]]]:
    """(steps of a trajectory, this process's (prompt, step)): evenly over the steps in which the component ran, of one
    prompt, or of all in turns; besides, one of each group of steps that would have none."""
    ran = [store.steps_of(component, p) for p in range(prompts)]
    if one_trajectory:
        longest = max(range(prompts), key=lambda p: len(ran[p]))
        ran = [steps if p == longest else [] for p, steps in enumerate(ran)]
    turns = [p for p, steps in enumerate(ran) if steps]
    chosen = []
    for i in range(count if turns else 0):
        p = turns[i % len(turns)]
        chosen.append((p, ran[p][int((i + 0.5) / count * len(ran[p]))]))
    for prompt in turns[:1]:
        borders = [k * len(ran[prompt]) // groups for k in range(groups + 1)]
        for first, end in pairwise(borders):
            if not any(first <= ran[p].index(step) < end for p, step in chosen):
                chosen.append((prompt, ran[prompt][(first + end) // 2]))
    chosen = list(dict.fromkeys(chosen))
    if len(chosen) < ranks.size():
        raise AttarError(
            f"{len(chosen)} measured steps cannot be shared by {ranks.size()} processes" if chosen
            else "the component did not run in any traced step",
            where=component,
            fix="Start fewer processes, measure more samples (allocate.samples), or trace more steps",
        )  # fmt: skip
    return max(map(len, ran)), list(ranks.mine(chosen))


def _inside(block: Block, plans: list[LayerPlan]) -> dict[str, LayerPlan]:
    """The plans of the block's linears by their names in it, without those that are kept."""
    prefix = f"{block.name}."
    return {p.name.removeprefix(prefix): p for p in plans if p.name.startswith(prefix) and not p.skipped}
