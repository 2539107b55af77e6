"""What a block costs, by trying it: copies of it are quantized and trained on one sample."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from attar.forecast.calibration import STEP_FORWARDS, BlockCost, computed_anew
from attar.losses import mse
from attar.models.adapter import Block, evaluating
from attar.models.arithmetic import Arithmetic
from attar.models.block import BlockCall
from attar.models.tree import tensors_of, tokens_of
from attar.quantize.block import quantize_block
from attar.quantize.finetune import Finetuner, Layer, NothingTrained
from attar.quantize.linear import replace_module
from attar.quantize.plan import LayerPlan, open_planned
from attar.quantize.polish import ScaledCodes
from attar.quantize.recompute import LEAST
from attar.quantize.wrap import input_facts, wrap_linears
from attar.recipe import Recipe
from attar.runtime.clock import now
from attar.runtime.layers import packed_layers
from attar.settings import block_settings, finetune_settings

STEPS = 4  # of each training


class Trial:
    """One block. plans: of its linears by their names in it. call: a sample of its inputs."""

    def __init__(
        self,
        block: Block,
        plans: Mapping[str, LayerPlan],
        call: BlockCall,
        recipe: Recipe,
        arithmetic: Arithmetic,
    ) -> None:
        self.block, self.plans, self.recipe, self.arithmetic = block, plans, recipe, arithmetic
        self.call = call.to(arithmetic.device)
        # which pair of clipping factors is used costs nothing
        self.settings = dataclasses.replace(block_settings(recipe), clip_groups=None)

    def learning(self) -> BlockCost:
        """Of the block by itself: quantized once, and learned where the recipe says so."""
        self._quantize(0)  # warms up
        once, forward = self._quantize(0)
        if not self.settings.epochs:
            return BlockCost(once, forward, 0.0, 0.0, 0.0)
        watch = _Watch(self._now)
        self._quantize(STEPS, watch)
        stages = [s for s in (self.settings.learning, self.settings.rounding) if s is not None and s.epochs]
        # epochs are counted on from one stage to the next, and each of the trial has one step
        found = [watch.steps(lambda epoch, k=k: (epoch - 1) // STEPS == k) for k in range(len(stages))]
        seconds = sum(stage.epochs * each.seconds(forward) for stage, each in zip(stages, found, strict=True))
        saved = max(each.saved for each in found)
        return self._cost(once, forward, seconds / self.settings.epochs, saved, 1)

    def training(self) -> BlockCost:
        """Of the block in an end-to-end training, without terms that look beyond it, with all its layers trained."""
        module, settings = self._copy(), finetune_settings(self.recipe)
        target, run = self._target(module), partial(self._run, module)
        forward = self._seconds(lambda: self._target(module))
        watch = _Watch(self._now)
        layers = self._layers(module)
        try:
            tuner = Finetuner(run, [(self.call, target)] * settings.batch_size, layers, settings)
        except NothingTrained:
            return self._passed(run, forward, watch)
        with watch.hooks:
            tuner.train(lambda tuner, loss: watch.ended(tuner.step), until=STEPS)
        found = watch.steps()
        return self._cost(0.0, forward, found.seconds(forward), found.saved, settings.batch_size)

    def _layers(self, module: nn.Module) -> dict[str, Layer]:
        """What is trained, in its place in the module."""
        if self.recipe.polishes:
            self._quantize(0, module=module)
            layers: dict[str, Layer] = {name: ScaledCodes(p) for name, p in packed_layers(module).items()}
            for name, layer in layers.items():
                replace_module(module, name, layer)
            return layers
        open_planned(module, self.plans)
        linears: dict[str, nn.Module] = {name: module.get_submodule(name) for name in self.plans}
        run = partial(self._run, module)
        inputs = input_facts(self.plans, linears, run, [self.call], self.settings, "0")
        return dict(wrap_linears(module, self.plans, linears, inputs, run, [self.call], self.settings, "0"))

    def _passed(
        self, run: Callable[[BlockCall], dict[str, Tensor]], forward: float, watch: _Watch
    ) -> BlockCost:
        """Of a block in which nothing is trained, and through which gradients pass."""
        streams = {
            name: stream.detach().requires_grad_(stream.is_floating_point())
            for name, stream in self.call.streams.items()
        }
        with watch.hooks, torch.enable_grad():
            for step in range(STEPS):
                outputs = run(dataclasses.replace(self.call, streams=streams))
                torch.stack([output.sum() for output in outputs.values()]).sum().backward()
                watch.ended(step)
        found = watch.steps()
        return self._cost(0.0, forward, found.seconds(forward), found.saved, 1)

    def _cost(self, once: float, forward: float, seconds: float, saved: float, batch: int) -> BlockCost:
        """seconds, saved: of a step of so many samples."""
        rows = batch * max(tokens_of(stream).shape[:-1].numel() for stream in self.call.streams.values())
        anew = [computed_anew(plan, rows) for plan in self.plans.values()]
        # such layers keep their rounded weight where no hook sees it
        large = [p for p in self.plans.values() if rows * p.in_features >= LEAST]
        kept = sum(4.0 * p.in_features * p.out_features for p in large)
        return BlockCost(
            once, forward, seconds / batch, (saved + kept) / batch, max(anew, default=0.0),
            sum(t.nbytes for t in tensors_of(self.call.streams)),
        )  # fmt: skip

    def _copy(self) -> nn.Module:
        return copy.deepcopy(self.block.module).float().requires_grad_(False)

    def _run(self, module: nn.Module, call: BlockCall) -> dict[str, Tensor]:
        return self.arithmetic.run(module, call, self.block.outputs)

    def _target(self, module: nn.Module) -> dict[str, Tensor]:
        with evaluating(module):
            return self._run(module, self.call)

    def _quantize(
        self, epochs: int, watch: _Watch | None = None, module: nn.Module | None = None
    ) -> tuple[float, float]:
        """Quantizes the module, or else a copy of the block; returns the seconds of it all, and of a forward before."""
        module = self._copy() if module is None else module
        started = self._now()
        target: dict[str, Tensor] = {}
        forward = self._seconds(lambda: target.update(self._target(module)))
        learning, rounding = (
            dataclasses.replace(stage, epochs=epochs) if stage is not None and epochs else None
            for stage in (self.settings.learning, self.settings.rounding)
        )
        watch = _Watch(self._now) if watch is None else watch
        with watch.hooks:
            quantize_block(
                module, self.plans, partial(self._run, module), [self.call], [target],
                dataclasses.replace(self.settings, learning=learning, rounding=rounding),
                loss=lambda prediction, wanted, context: mse(prediction, wanted),
                progress=lambda epoch, step, loss: watch.ended(epoch),
            )  # fmt: skip
        return self._now() - started, forward

    def _seconds(self, work: Callable[[], Any]) -> float:
        started = self._now()
        work()
        return self._now() - started

    def _now(self) -> float:
        return now(self.arithmetic.device)


class _Watch:
    """Counts the bytes that backward passes keep, and notes when steps end."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.saved = clock, 0
        self.noted: list[tuple[int, float, int]] = []  # (step or epoch, when it ended, what it kept)
        self.hooks = saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        self.saved += tensor.nbytes
        return tensor

    def ended(self, step: int) -> None:
        self.noted.append((step, self.clock(), self.saved))
        self.saved = 0

    def steps(self, wanted: Callable[[int], bool] = lambda step: True) -> _Steps:
        some = [(end, saved) for step, end, saved in self.noted if wanted(step)]
        return _Steps([end for end, _ in some], max((saved for _, saved in some), default=0))


@dataclasses.dataclass(frozen=True)
class _Steps:
    """ends: when each was done. saved: the most bytes that one kept."""

    ends: list[float]
    saved: int

    def seconds(self, forward: float) -> float:
        """Of a step, the median without the first one; of a single step an estimate from the forward's."""
        if not self.ends:
            return 0.0
        times = [after - before for before, after in itertools.pairwise(self.ends)]
        return statistics.median(times) if times else STEP_FORWARDS * forward
