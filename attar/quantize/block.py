"""One transformer block from full precision to packed layers: wrap, learn, round, bake."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.errors import AttarError
from attar.losses import relative_error
from attar.quantize.adaptive import InputSample, collect_input_samples, describe
from attar.quantize.frame_gate import FrameGrid, start_gates
from attar.quantize.initialize import (
    TransformSettings,
    build_rotation,
    build_transforms,
    collect_input_means,
    collect_input_stats,
)
from attar.quantize.learned_codes import LearnedCodes
from attar.quantize.linear import QuantizedLinear, parameter_groups, replace_module, set_quantizers
from attar.quantize.low_rank import LowRankSettings, start_branch
from attar.quantize.plan import LayerPlan, open_planned
from attar.quantize.reconstruct import (
    Loss,
    ReconstructionResult,
    ReconstructionSettings,
    Streams,
    reconstruct_block,
)
from attar.quantize.rounding import collect_hessians, gptq_codes
from attar.quantize.row_bits import RowBitsSettings, mix_rows
from attar.quantize.seeds import seed_of
from attar.quantize.transforms import LearnedScale
from attar.runtime.layers import PackedLinear
from attar.runtime.transform import half


@dataclass(frozen=True)
class BlockSettings:
    """How a block is quantized. `learning` None trains nothing; `gptq_damping` None rounds to nearest.

    clip_start: logit from which clipping factors start; clip_search: weights' factors start where rounding errs least.
    round_weights: weights are rounded while the block learns; else only activations are, which leaves the weights to
    what comes behind it; layers with floating-point activations round their weights in any case. gptq_whole,
    gptq_by_activation: see `gptq_codes`. rounding: codes are learned behind all that, and their scales where these
    have a rate (`LearnedCodes`).
    stats_ema: momentum of the channels' statistics, see `collect_input_stats`.
    """

    transforms: TransformSettings
    weight_clip: bool = True
    act_clip: bool = True
    clip_start: float = 4.0
    clip_search: bool = False
    stats_ema: float | None = None
    learning: ReconstructionSettings | None = None
    train_scale: bool = True
    train_rotation: bool = True
    train_clip: bool = True
    train_levels: bool = False
    train_branch: bool = False
    round_weights: bool = True
    gptq_damping: float | None = None
    gptq_block: int = 128
    gptq_whole: bool = False
    gptq_by_activation: bool = False
    rounding: ReconstructionSettings | None = None
    low_rank: LowRankSettings | None = None
    row_bits: RowBitsSettings | None = None

    @property
    def epochs(self) -> int:
        """Passes over the samples with gradients, of transforms and of codes."""
        return sum(stage.epochs for stage in (self.learning, self.rounding) if stage is not None)

    def keeps_weight(self, layer: QuantizedLinear) -> bool:
        """Whether the layer's weight is not rounded while the block learns; a weight-only layer has nothing else."""
        return not self.round_weights and layer.act_bits is not None and bool(len(layer.transforms))

    def treatment(self, plan: LayerPlan) -> list[str]:
        """What a planned layer goes through, in order: ["channel scale", "kronecker", …, "gptq"]; [] when skipped."""
        if plan.skipped or plan.plain:
            return [] if plan.skipped else ["nearest"]
        chosen = self.transforms
        steps = [("channel scale", chosen.scale), (chosen.rotation, chosen.rotation != "none")]
        if chosen.order == "rotate_then_scale":
            steps.reverse()
        steps = [("channel shift", chosen.shift), *steps]
        steps += [
            ("bits by rows", plan.row_bits is not None),
            ("searched weight clipping" if self.clip_search else "weight clipping", self.weight_clip),
            (f"low-rank branch ({plan.low_rank})", plan.low_rank > 0),
            ("activation clipping", self.act_clip and plan.act_bits is not None),
            ("nearest", self.gptq_damping is None),
            ("gptq", self.gptq_damping is not None),
            ("learned rounding", self.rounding is not None),
            ("learned scales of codes", self.rounding is not None and self.rounding.scale_lr > 0),
        ]
        return [name for name, taken in steps if taken]


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
) -> BlockOutcome:
    """Replaces the planned linears of `module` by packed layers, in place; convolutions are opened for it.

    plans: dotted name below `module` -> plan (skipped layers are left out by the caller). run: runs the block on one
    call. calls, targets: calibration samples with the full-precision outputs, of several processes the share of each;
    both may be empty for settings that need no data. contexts: what `loss` gets beside them. seed: of the random
    rotations and the order of samples, a text. frames: of the video, for gates over them; None makes no gates.
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
    samples = _input_samples(plans, linears, run, calls, settings)
    threshold = settings.transforms.rotation_threshold
    outcome.rotations = {name: describe(sample, threshold) for name, sample in samples.items()}
    layers = wrap_linears(module, plans, linears, run, calls, settings, seed, samples)
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
            _search_clips(whole)  # transforms have moved, and clipping has not
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


def wrap_linears(
    module: nn.Module,
    plans: Mapping[str, LayerPlan],
    linears: Mapping[str, nn.Module],
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    settings: BlockSettings,
    seed: str,
    samples: Mapping[str, InputSample] | None = None,
) -> dict[str, QuantizedLinear]:
    """Puts a QuantizedLinear around every planned linear, and returns them.

    Plain layers get neither transforms nor clipping. linears: the planned ones by name. samples: of their inputs, which
    adaptive rotations need; by default they are collected here. Otherwise as `quantize_block`.
    """
    if samples is None:
        samples = _input_samples(plans, linears, run, calls, settings)
    calibrated = [name for name, plan in plans.items() if not plan.plain]
    generators = {name: torch.Generator().manual_seed(seed_of(seed, name)) for name in calibrated}
    shifts: dict[str, Tensor] = {}
    if settings.transforms.shift and calibrated:
        if not calls:
            raise AttarError("channel shifts need calibration samples")
        means = collect_input_means(run, calls, {name: linears[name] for name in calibrated})
        shifts = {name: half(mean).float() for name, mean in means.items()}  # as they will be deployed
        samples = {name: sample.shifted(shifts[name]) for name, sample in samples.items()}
    rotations = {}
    if settings.transforms.order == "rotate_then_scale":  # its scales are of rotated inputs
        for name in calibrated:
            rotation = build_rotation(
                plans[name].in_features, settings.transforms, generators[name], samples.get(name)
            )
            if rotation is not None:
                rotations[name] = rotation
    stats: dict[str, Tensor] = {}
    if settings.transforms.scale and calibrated:
        if not calls:
            raise AttarError("channel scales need calibration samples")
        if settings.stats_ema is not None and ranks.size() > 1:
            raise AttarError(
                "a running average of channel maxima depends on the order of samples, which several processes share",
                where="quantize.stats_ema",
                fix="Leave it out, or use one process",
            )
        inputs = {name: linears[name] for name in calibrated}
        stats = collect_input_stats(
            run, calls, inputs, ema=settings.stats_ema, rotations=rotations, shifts=shifts
        )
        stats = {name: ranks.max_(stats[name]) for name in calibrated}
    layers = {}
    for name, plan in plans.items():
        linear: Any = linears[name]
        transforms = []
        if not plan.plain:
            transforms = build_transforms(
                linear, stats.get(name), settings.transforms, generators[name], rotations.get(name),
                samples.get(name),
            )  # fmt: skip
        layer = QuantizedLinear(
            linear, plan.weight_bits or 0, plan.act_bits, transforms, group_size=plan.group_size,
            weight_clip=settings.weight_clip and not plan.plain, act_clip=settings.act_clip,
            clip_start=settings.clip_start, weight_format=plan.weight_format, act_format=plan.act_format,
            train_levels=settings.train_levels and not plan.plain, shift=shifts.get(name), act_groups=plan.act_groups,
        )  # fmt: skip
        replace_module(module, name, layer)
        layers[name] = layer
    searched = [layer for name, layer in layers.items() if settings.clip_search and not plans[name].plain]
    _search_clips(searched)
    if settings.row_bits is not None:
        _mix_rows(layers, plans, run, calls, settings.row_bits, seed, settings.clip_search)
    if settings.low_rank is not None:
        _start_branches(layers, plans, run, calls, settings.low_rank, seed)
    if settings.row_bits is not None or settings.low_rank is not None:
        _search_clips(searched)  # other bits, or another weight, are rounded now
    return layers


def _search_clips(layers: Iterable[QuantizedLinear]) -> None:
    """Searched clipping, of which all processes take the first one's."""
    found = list(layers)
    for layer in found:
        layer.search_clip()
    ranks.same_([layer.quantizer.clip_logit for layer in found if layer.quantizer.clip_logit is not None])


def _input_samples(
    plans: Mapping[str, LayerPlan],
    linears: Mapping[str, nn.Module],
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    settings: BlockSettings,
) -> dict[str, InputSample]:
    """Of the layers that get an adaptive rotation."""
    if settings.transforms.rotation != "adaptive":
        return {}
    calibrated = {name: linears[name] for name, plan in plans.items() if not plan.plain}
    if calibrated and not calls:
        raise AttarError("adaptive rotations need calibration samples")
    return collect_input_samples(run, calls, calibrated)


def _mix_rows(
    layers: Mapping[str, QuantizedLinear],
    plans: Mapping[str, LayerPlan],
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    settings: RowBitsSettings,
    seed: str,
    search_clip: bool,
) -> None:
    chosen = {name: layer for name, layer in layers.items() if plans[name].row_bits is not None}
    for layer, moment, generator in _with_moments(chosen, settings.metric, run, calls, seed, "rows"):
        mix_rows(layer, settings, moment, generator, search_clip)


def _start_branches(
    layers: Mapping[str, QuantizedLinear],
    plans: Mapping[str, LayerPlan],
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    settings: LowRankSettings,
    seed: str,
) -> None:
    chosen = {name: layer for name, layer in layers.items() if plans[name].low_rank}
    for layer, moment, generator in _with_moments(chosen, settings.metric, run, calls, seed, "branch"):
        start_branch(layer, settings, moment, generator)


def _with_moments(
    layers: Mapping[str, QuantizedLinear],
    metric: str,
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    seed: str,
    purpose: str,
) -> Iterator[tuple[QuantizedLinear, Tensor | None, torch.Generator]]:
    """Each layer with the second moment of its inputs, which the metric "output" needs, and a generator of its own."""
    moments = collect_hessians(run, calls, layers) if metric == "output" else {}
    for name, layer in layers.items():
        yield layer, moments.pop(name, None), torch.Generator().manual_seed(seed_of(seed, name, purpose))


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
        "levels": groups["levels"],
        "branch": branches,
    }


@torch.no_grad()
def mean_relative_error(
    run: Callable[[Any], Streams], calls: Sequence[Any], targets: Sequence[Streams]
) -> float:
    """`relative_error` over the samples of all processes."""
    errors = [
        relative_error(run(call), target, call.streams).item()
        for call, target in zip(calls, targets, strict=True)
    ]
    total, count = ranks.sums(sum(errors), len(errors))
    return total / count


@torch.no_grad()
def errors_by_group(
    run: Callable[[Any], Streams], calls: Sequence[Any], targets: Sequence[Streams], groups: int
) -> list[float]:
    """The mean error of the samples of each group of steps, over all processes. AttarError where one has none."""
    totals, counts = [0.0] * groups, [0] * groups
    for call, target in zip(calls, targets, strict=True):
        totals[call.group] += relative_error(run(call), target, call.streams).item()
        counts[call.group] += 1
    found = ranks.sums(*totals, *counts)
    if not all(found[groups:]):
        raise AttarError(
            "no sample was measured in one of the groups of steps",
            where="allocate.samples",
            fix="Ask for more samples, or fewer groups (quantize.step_groups)",
        )
    return [total / count for total, count in zip(found[:groups], found[groups:], strict=True)]
