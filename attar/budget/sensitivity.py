"""How much a block's output changes when one of its layers alone is quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.budget.replay import Replay
from attar.quantize.block import mean_error, mean_relative_error, sample_error
from attar.quantize.block_settings import BlockSettings
from attar.quantize.linear import QuantizedLinear, replace_module, set_quantizers
from attar.quantize.plan import LayerPlan, open_planned
from attar.quantize.reconstruct import Streams
from attar.quantize.wrap import InputFacts, wrap_linears

Sensitivity = dict[str, dict[int, float]]  # layer -> bits -> error
Average = Callable[[Sequence[float], Sequence[Any]], Any]  # (errors of samples, their calls) -> what is kept


def block_sensitivity(
    module: nn.Module,
    options: Mapping[str, Mapping[int, LayerPlan]],
    inputs: InputFacts,
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    targets: Sequence[Streams],
    settings: BlockSettings,
    *,
    seed: str = "0",
    weights: bool = True,
    acts: bool = True,
    progress: Callable[[int, int], None] | None = None,
    average: Average = mean_error,
) -> dict[str, dict[int, Any]]:
    """Squared error of the block's output relative to the block's own update, for every layer and width.

    One layer at a time is quantized: its activations as planned (`acts`; else they stay), its weights rounded to
    nearest (`weights`), transforms and clipping where they start; nothing is learned. The module is left as it was, but
    for convolutions, which are opened.
    options: dotted name below `module` -> bits -> plan. inputs: of these layers. run, calls, targets, seed: as in
    `quantize_block`. progress: called with (runs of the block done, all of them). average: of the errors of the
    samples, given the calls; their mean by default.
    """
    open_planned(module, {name: next(iter(plans.values())) for name, plans in options.items()})
    linears: dict[str, Any] = {name: module.get_submodule(name) for name in options}
    widths = sorted({bits for plans in options.values() for bits in plans})
    errors: dict[str, dict[int, Any]] = {name: {} for name in options}
    replay = Replay(linears)
    done, total = 0, len(calls) * sum(map(len, options.values()))
    for bits in widths:
        plans = {name: plans[bits] for name, plans in options.items() if bits in plans}
        layers = _wrapped(module, plans, linears, inputs, run, calls, settings, seed, weights, acts)
        for name in layers:
            replace_module(module, name, linears[name])
        found: dict[str, list[float]] = {name: [] for name in layers}
        for call, target in zip(calls, targets, strict=True):
            with torch.no_grad(), replay.recorded():
                run(call)
            for name, layer in layers.items():
                replace_module(module, name, layer)
                with replay.until(name):
                    found[name].append(sample_error(run, call, target))
                replace_module(module, name, linears[name])
                done += 1
                if progress is not None:
                    progress(done, total)
        for name in layers:
            errors[name][bits] = average(found[name], calls)
    return errors


def together(
    module: nn.Module,
    plans: Mapping[str, LayerPlan],
    inputs: InputFacts,
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    targets: Sequence[Streams],
    settings: BlockSettings,
    *,
    seed: str = "0",
    weights: bool = True,
    acts: bool = True,
) -> float:
    """The same error with all layers quantized at once, which stay so."""
    open_planned(module, plans)
    linears = {name: module.get_submodule(name) for name in plans}
    _wrapped(module, plans, linears, inputs, run, calls, settings, seed, weights, acts)
    return mean_relative_error(run, calls, targets)


def _wrapped(
    module: nn.Module,
    plans: Mapping[str, LayerPlan],
    linears: Mapping[str, nn.Module],
    inputs: InputFacts,
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    settings: BlockSettings,
    seed: str,
    weights: bool,
    acts: bool,
) -> dict[str, QuantizedLinear]:
    """Layers that round their weights or their inputs, or both."""
    if not weights:
        settings = replace(settings, clip_search=False)  # nothing is clipped
    layers = wrap_linears(module, plans, linears, inputs, run, calls, settings, seed)
    set_quantizers(list(layers.values()), weights, acts)
    return layers


def multiplications(
    module: nn.Module, names: Sequence[str], run: Callable[[Any], Streams], calls: Sequence[Any]
) -> dict[str, int]:
    """How many multiplications each of these layers does in the calls of all processes. names: of linears in it."""
    counts = dict.fromkeys(names, 0)

    def counting(name: str, linear: Any) -> Any:
        def count(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
            counts[name] += args[0].numel() * linear.out_features

        return linear.register_forward_hook(count)

    handles = [counting(name, module.get_submodule(name)) for name in names]
    try:
        for call in calls:
            run(call)
    finally:
        for handle in handles:
            handle.remove()
    return {name: int(total) for name, total in zip(names, ranks.sums(*counts.values()), strict=True)}
