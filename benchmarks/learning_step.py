"""Process time of an optimizer step of block reconstruction on CPU, with and without the compiled kernels.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.learning_step

A block of digits-video learns by the recipe s2q-vdit in turns on the backends `reference` and `cpu`. Printed are
medians: of the steps, of the evaluations between epochs for one sample, and of the parts of a step, each run forwards
and backwards by itself for the weight and the input of every linear.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.calibration.catch import catch_block_calls
from attar.calibration.store import TraceStore
from attar.calibration.trace import trace_pipeline
from attar.losses import mse
from attar.models.adapter import Block, ModelAdapter
from attar.models.block import BlockCall, run_block
from attar.models.source import find_source, load_pipeline
from attar.planning import plan_component
from attar.quantize.batching import Streams, concatenate_calls
from attar.quantize.block import quantize_block
from attar.quantize.block_settings import BlockSettings
from attar.quantize.formats import fake_quantize_tokens, fake_quantize_weight
from attar.quantize.plan import LayerPlan
from attar.quantize.transforms import LearnedKronecker, apply_kronecker
from attar.recipe import load_recipe
from attar.runtime.backend import backend_description, use_backend
from attar.settings import block_settings

BLOCK, SAMPLES, EPOCHS, TURNS = 3, 8, 3, 4
BACKENDS = ("reference", "cpu")


class Subject:
    """A block, its samples (both guidance branches in one), and what the recipe makes of its linears."""

    block: Block
    calls: list[BlockCall]
    plans: dict[str, LayerPlan]
    settings: BlockSettings

    def __init__(self) -> None:
        source = find_source("digits-video")
        pipe = load_pipeline(source)
        call = source.call_arguments(num_inference_steps=SAMPLES)
        options = {k: v for k, v in call.items() if k not in ("num_inference_steps", "guidance_scale")}
        recipe = load_recipe("s2q-vdit")
        self.settings = block_settings(recipe)
        adapter = ModelAdapter.of(pipe.transformer)
        self.block = adapter.blocks[BLOCK]
        prefix = f"{self.block.name}."
        plans = [p for p in plan_component(pipe.transformer, recipe) if p.name.startswith(prefix)]
        self.plans = {p.name.removeprefix(prefix): p for p in plans if not p.skipped}
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            store = TraceStore(Path(folder))
            trace_pipeline(
                pipe, source.prompts[:1], store, seed=0, steps=SAMPLES,
                guidance_scale=call.get("guidance_scale"), generation=options,
            )  # fmt: skip
            branches = [store.calls("transformer", 0, step) for step in range(SAMPLES)]
            caught = [catch_block_calls(pipe.transformer, adapter, BLOCK, b) for b in branches]
        self.calls = [concatenate_calls(c) for c in caught]

    def learn(self) -> tuple[list[float], list[float]]:
        """Milliseconds of the steps, and of the evaluations for one sample."""
        module = copy.deepcopy(self.block.module)
        learning = self.settings.learning
        assert learning is not None
        settings = replace(self.settings, learning=replace(learning, epochs=EPOCHS), gptq_damping=None)
        times: list[tuple[int, float]] = []

        def run(call: BlockCall) -> Streams:
            return run_block(module, call, self.block.outputs)

        with torch.no_grad():
            targets = [run(call) for call in self.calls]
        quantize_block(
            module, self.plans, run, self.calls, targets, settings,
            loss=lambda prediction, target, _: mse(prediction, target),
            progress=lambda epoch, *_: times.append((epoch, time.process_time() * 1e3)),
        )  # fmt: skip
        pairs = list(itertools.pairwise(times))
        steps = [end - start for (before, start), (epoch, end) in pairs if epoch == before]
        turns = [end - start for (before, start), (epoch, end) in pairs if epoch != before]
        return steps, [(turn - median(steps)) / SAMPLES for turn in turns]  # an evaluation and a step

    @torch.no_grad()
    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and input rows of every linear that learns."""
        found = []

        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            weight: Tensor = module.weight.detach()  # type: ignore[assignment]
            found.append((weight.clone(), args[0].flatten(0, -2).clone()))

        names = [name for name, plan in self.plans.items() if plan.act_bits is not None]
        handles = [self.block.module.get_submodule(n).register_forward_pre_hook(hook) for n in names]
        run_block(self.block.module, self.calls[0], self.block.outputs)
        for handle in handles:
            handle.remove()
        return found


def parts(weight: Tensor, x: Tensor) -> dict[str, Callable[[], None]]:
    """What a step does with one linear, forwards and backwards."""
    weight, x = weight.requires_grad_(), x.requires_grad_()
    weight_clip = torch.full((2, weight.shape[0], 1), 0.98).requires_grad_()
    clip = torch.full((2,), 0.98).requires_grad_()
    rotation = LearnedKronecker(weight.shape[1])
    left, right = (m.detach().requires_grad_() for m in rotation.matrices()[:2])
    outputs = torch.ones(x.shape[0], weight.shape[0])

    def gradients(y: Tensor, *leaves: Tensor) -> None:
        torch.autograd.grad(y, leaves, torch.ones_like(y) if y.shape != outputs.shape else outputs)

    def quantize() -> None:
        gradients(fake_quantize_weight(weight, 4, weight_clip), weight, weight_clip)
        gradients(fake_quantize_tokens(x, 6, clip), x, clip)

    def rotate() -> None:
        for rows in (weight, x):
            gradients(apply_kronecker(rows, left, right), rows, left, right)

    def matrices() -> None:
        made = rotation.matrices()[:2]
        torch.autograd.grad(made, list(rotation.parameters()), [left.detach(), right.detach()])

    return {
        "fake quantization": quantize,
        "Kronecker rotation": rotate,
        "its matrices": matrices,
        "product": lambda: gradients(F.linear(x, weight), x, weight),
    }


def milliseconds(function: Callable[[], None], repeats: int = 15) -> float:
    """Median process time."""
    times = []
    for _ in range(repeats):
        start = time.process_time_ns()
        function()
        times.append((time.process_time_ns() - start) / 1e6)
    return median(times)


def main() -> None:
    subject = Subject()
    steps: dict[str, list[float]] = {name: [] for name in BACKENDS}
    evaluations: dict[str, list[float]] = {name: [] for name in BACKENDS}
    rows: dict[str, dict[str, float]] = {}
    linears = [parts(*tensors) for tensors in subject.inputs()]
    for turn in range(TURNS):
        for name in BACKENDS if turn % 2 == 0 else reversed(BACKENDS):
            with use_backend(name):
                some, others = subject.learn()
            steps[name] += some
            evaluations[name] += others
    for name in BACKENDS:
        rows.setdefault("step", {})[name] = median(steps[name])
        rows.setdefault("evaluation of a sample", {})[name] = median(evaluations[name])
        with use_backend(name):
            for part in linears[0]:
                rows.setdefault(part, {})[name] = sum(milliseconds(linear[part]) for linear in linears)
    stream = next(iter(subject.calls[0].streams.values()))
    print(
        f"block {subject.block.name} of digits-video, {tuple(stream.shape)}, {torch.get_num_threads()} threads"
    )
    for name in BACKENDS:
        with use_backend(name):
            print(f"  {backend_description()}")
    print(f"{'ms of process time':26}{BACKENDS[0]:>10}{BACKENDS[1]:>10}")
    for title, row in rows.items():
        ratio = row[BACKENDS[0]] / row[BACKENDS[1]]
        print(f"{title:26}" + "".join(f"{row[name]:10.2f}" for name in BACKENDS) + f"{ratio:8.2f}x")


if __name__ == "__main__":
    main()
