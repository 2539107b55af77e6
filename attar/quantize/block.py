"""One transformer block from full precision to packed layers: wrap, learn, round, bake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.errors import AttarError
from attar.losses import relative_error
from attar.quantize.adaptive import describe
from attar.quantize.batching import like
from attar.quantize.block_settings import BlockSettings
from attar.quantize.frame_gate import FrameGrid, start_gates
from attar.quantize.learned_codes import LearnedCodes
from attar.quantize.linear import QuantizedLinear, parameter_groups, replace_module, set_quantizers
from attar.quantize.plan import LayerPlan, open_planned
from attar.quantize.reconstruct import (
    Loss,
    ReconstructionResult,
    Streams,
    reconstruct_block,
)
from attar.quantize.rounding import collect_hessians, gptq_codes
from attar.quantize.seeds import seed_of
from attar.quantize.transforms import LearnedScale
from attar.quantize.wrap import input_facts, search_clips, wrap_linears
from attar.runtime.layers import PackedLinear


@dataclass
class BlockOutcome:
    """Errors are squared output errors relative to the block's own update, averaged over the calibration samples.

    error_before: with transforms and clipping at their start, nearest rounding. error_after: of the packed block.
    rotations: of layers whose rotation was chosen by their input, which it is and why. gates: of layers with a branch,
    where gates over frames were asked for, the gate at its end, or None for a layer that has none.
    """

    error_before: float | None = None
    error_after: float | None = None
    learning: ReconstructionResult | None = None
    rounding: ReconstructionResult | None = None
    layers: dict[str, PackedLinear] = field(default_factory=dict)
    rotations: dict[str, dict[str, Any]] = field(default_factory=dict)
    gates: dict[str, list[float] | None] = field(default_factory=dict)


def quantize_block(
    module: nn.Module,
    plans: Mapping[str, LayerPlan],
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    targets: Sequence[Streams],
    settings: BlockSettings,
    *,
    loss: Loss,
    contexts: Sequence[Any] | None = None,
    seed: str = "0",
    progress: Callable[[int, int, float], None] | None = None,
    frames: FrameGrid | None = None,
    types: Mapping[str, torch.dtype] | None = None,
) -> BlockOutcome:
    """Replaces the planned linears of `module` by packed layers, in place; convolutions are opened for it.

    plans: dotted name below `module` -> plan (skipped layers are left out by the caller). run: runs the block on one
    call. calls, targets: calibration samples with the full-precision outputs, of several processes the share of each;
    both may be empty for settings that need no data. contexts: what `loss` gets beside them. seed: of the random
    rotations and the order of samples, a text. frames: of the video, for gates over them; None makes no gates. types:
    that the parameters will have in the packed model, by their names, where it is another than now.
    Raises AttarError when the settings need data and there is none, or a weight is not finite.
    """
    outcome = BlockOutcome()
    open_planned(module, plans)
    linears: dict[str, Any] = {name: module.get_submodule(name) for name in plans}
    for name, linear in linears.items():
        if not bool(torch.isfinite(linear.weight).all()):
            raise AttarError(
                "a weight is not finite", where=plans[name].name, fix="Check the model before compressing"
            )
    inputs = input_facts(plans, linears, run, calls, settings, seed)
    threshold = settings.transforms.rotation_threshold
    outcome.rotations = {name: describe(sample, threshold) for name, sample in inputs.samples.items()}
    layers = wrap_linears(module, plans, linears, inputs, run, calls, settings, seed, types)
    if frames is not None and settings.low_rank is not None and settings.low_rank.gate != "none":
        branches = {name: layer for name, layer in layers.items() if plans[name].low_rank}
        gates = start_gates(branches, plans, frames, run, calls, settings.low_rank.gate == "trained")
        outcome.gates = dict.fromkeys(gates)
    if calls:
        outcome.error_before = mean_relative_error(run, calls, targets)
    learn = partial(reconstruct_block, run, calls, targets, loss=loss, contexts=contexts)
    if settings.learning is not None:
        generator = torch.Generator().manual_seed(seed_of(seed, "order"))
        whole = [layer for layer in layers.values() if settings.keeps_weight(layer)]
        set_quantizers(whole, False, True)
        outcome.learning = learn(
            _trained(layers.values(), settings), settings.learning, generator=generator, progress=progress
        )
        set_quantizers(whole, True, True)
        if settings.clip_search:
            search_clips(whole)  # transforms have moved, and clipping has not
    codes = {} if settings.gptq_damping is None else _gptq_codes(layers, plans, run, calls, settings)
    scales: dict[str, Tensor] = {}
    if settings.rounding is not None:
        for name, layer in layers.items():
            layer.freeze(codes.pop(name, None))
        generator = torch.Generator().manual_seed(seed_of(seed, "rounding"))
        done = settings.epochs - settings.rounding.epochs

        def after(epoch: int, step: int, loss: float) -> None:
            if progress is not None:
                progress(done + epoch, step, loss)

        learn = partial(learn, settings=settings.rounding, generator=generator, progress=after)
        learned = {name: layer for name, layer in layers.items() if not plans[name].plain}
        outcome.rounding, codes, scales = _learn_codes(module, learned, learn, settings.rounding.scale_lr > 0)
    for name in list(layers):
        outcome.layers[name] = layers[name].bake(codes.pop(name, None), scales.pop(name, None))
        gate = outcome.layers[name].frame_gate
        if gate is not None:
            outcome.gates[name] = gate.tolist()
        replace_module(module, name, outcome.layers[name])
        del layers[name], linears[name]  # so that the weights of a block are not all there twice
    if calls:
        outcome.error_after = mean_relative_error(run, calls, targets)
    return outcome


def _gptq_codes(
    layers: Mapping[str, QuantizedLinear],
    plans: Mapping[str, LayerPlan],
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    settings: BlockSettings,
) -> dict[str, Tensor]:
    """GPTQ's codes of all layers that are not plain. Several processes share the layers."""
    calibrated = {name: layer for name, layer in layers.items() if not plans[name].plain}
    hessians = collect_hessians(run, calls, calibrated)
    assert settings.gptq_damping is not None
    own, codes = ranks.mine(list(calibrated)), []
    for name in calibrated:
        hessian, layer = hessians.pop(name), calibrated[name]
        if name not in own:
            continue
        try:
            found = gptq_codes(
                layer, hessian, settings.gptq_damping, settings.gptq_block,
                settings.gptq_whole, settings.gptq_by_activation,
            )  # fmt: skip
            codes.append(found.cpu())
        except AttarError as error:
            raise AttarError(error.what, where=plans[name].name, fix=error.fix) from error
    everyone = zip(calibrated, ranks.collected(codes), strict=True)
    return {name: code.to(calibrated[name].weight.device) for name, code in everyone}


def _learn_codes(
    module: nn.Module,
    layers: Mapping[str, QuantizedLinear],
    learn: Callable[[dict[str, list[nn.Parameter]]], ReconstructionResult],
    with_scales: bool,
) -> tuple[ReconstructionResult, dict[str, Tensor], dict[str, Tensor]]:
    """The codes of frozen layers, learned together, and their scales, none where these are not learned.

    learn: trains groups of parameters, see `reconstruct_block`.
    """
    learned = {name: LearnedCodes(layer, with_scales) for name, layer in layers.items()}
    for name, layer in learned.items():
        replace_module(module, name, layer)
    scales = [layer.log_scale for layer in learned.values() if layer.log_scale is not None]
    result = learn({"codes": [layer.steps for layer in learned.values()], "scales": scales})
    for name, layer in layers.items():
        replace_module(module, name, layer)
    found = {name: layer.scales() for name, layer in learned.items()}
    return (
        result,
        {name: layer.codes() for name, layer in learned.items()},
        {name: scale for name, scale in found.items() if scale is not None},
    )


def _trained(layers: Any, settings: BlockSettings) -> dict[str, list[nn.Parameter]]:
    groups = parameter_groups(layers)
    scales = {
        id(p)
        for layer in layers
        for t in layer.transforms
        if isinstance(t, LearnedScale)
        for p in t.parameters()
    }
    wanted = {True: settings.train_scale, False: settings.train_rotation}
    branches = groups["branch"] if settings.train_branch else []
    clips = groups["clip"] if settings.train_clip else []
    # without a weight's rounding its clipping gets no gradient
    whole = {id(layer.quantizer.clip_logit) for layer in layers if settings.keeps_weight(layer)}
    clips = [p for p in clips if id(p) not in whole]
    for parameter in branches:
        parameter.requires_grad_()
    return {
        "transform": [p for p in groups["transform"] if wanted[id(p) in scales]],
        "clip": clips,
        "group_clip": groups.get("group_clip", []) if settings.train_clip else [],
        "levels": groups["levels"],
        "branch": branches,
    }


def mean_relative_error(
    run: Callable[[Any], Streams], calls: Sequence[Any], targets: Sequence[Streams]
) -> float:
    """`relative_error` over the samples of all processes."""
    return mean_error(
        [sample_error(run, call, target) for call, target in zip(calls, targets, strict=True)], calls
    )


@torch.no_grad()
def sample_error(run: Callable[[Any], Streams], call: Any, target: Streams) -> float:
    """`relative_error` of one sample."""
    prediction = run(call)  # the others may be kept elsewhere
    return relative_error(prediction, like(target, prediction), like(call.streams, prediction)).item()


def mean_error(errors: Sequence[float], calls: Sequence[Any]) -> float:
    """The mean of the errors of the calls of all processes."""
    total, count = ranks.sums(sum(errors), len(errors))
    return total / count


def errors_by_group(errors: Sequence[float], calls: Sequence[Any], groups: int) -> list[float]:
    """The mean error of the samples of each group of steps, over all processes. AttarError where one has none."""
    totals, counts = [0.0] * groups, [0] * groups
    for error, call in zip(errors, calls, strict=True):
        totals[call.group] += error
        counts[call.group] += 1
    found = ranks.sums(*totals, *counts)
    if not all(found[groups:]):
        raise AttarError(
            "no sample was measured in one of the groups of steps",
            where="allocate.samples",
            fix="Ask for more samples, or fewer groups (quantize.step_groups)",
        )
    return [total / count for total, count in zip(found[:groups], found[groups:], strict=True)]
