"""From a block's linears to layers that learn, by what calibration says of their inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.errors import AttarError
from attar.quantize.adaptive import InputSample, collect_input_samples
from attar.quantize.block_settings import BlockSettings
from attar.quantize.initialize import (
    build_rotation,
    build_transforms,
    collect_input_means,
    collect_input_stats,
)
from attar.quantize.linear import QuantizedLinear, replace_module
from attar.quantize.low_rank import LowRankSettings, start_branch
from attar.quantize.plan import LayerPlan
from attar.quantize.reconstruct import Streams
from attar.quantize.rounding import collect_hessians
from attar.quantize.row_bits import RowBitsSettings, mix_rows
from attar.quantize.seeds import seed_of
from attar.quantize.transforms import LearnedTransform
from attar.runtime.transform import half


@dataclass(frozen=True)
class InputFacts:
    """What calibration says of the inputs of a block's layers, by their names; empty where the settings ask for none.

    The same at every width, so that it is gathered once for all of them. samples: for adaptive rotations. shifts: the
    mean of each channel (d_in,), as deployed. rotations: where these come before the scale, with which maxima are of
    rotated inputs. maxima: the absolute maximum of each channel (d_in,), behind shift and rotation.
    """

    samples: dict[str, InputSample] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    rotations: dict[str, LearnedTransform] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)


def input_facts(
    plans: Mapping[str, LayerPlan],
    linears: Mapping[str, nn.Module],
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    settings: BlockSettings,
    seed: str,
) -> InputFacts:
    """What the transforms of the planned layers start from. linears: the planned ones by name, in their places.

    run, calls, seed: as in `quantize_block`. Plain layers need nothing of it. Raises AttarError when the settings need
    data and there is none.
    """
    calibrated = {name: linears[name] for name, plan in plans.items() if not plan.plain}
    transformed = {name: linears[name] for name, plan in plans.items() if plan.transformed}
    chosen = settings.transforms
    samples: dict[str, InputSample] = {}
    if chosen.rotation == "adaptive" and transformed:
        _need(calls, "adaptive rotations")
        samples = collect_input_samples(run, calls, transformed)
    shifts: dict[str, Tensor] = {}
    if chosen.shift and calibrated:
        _need(calls, "channel shifts")
        means = collect_input_means(run, calls, calibrated)
        shifts = {name: half(mean).float() for name, mean in means.items()}  # as they will be deployed
        samples = {name: sample.shifted(shifts[name]) for name, sample in samples.items()}
    rotations = {}
    if chosen.order == "rotate_then_scale":  # its scales are of rotated inputs
        for name in transformed:
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            rotation = build_rotation(plans[name].in_features, chosen, generator, samples.get(name))
            if rotation is not None:
                rotations[name] = rotation
    maxima: dict[str, Tensor] = {}
    if chosen.scale and transformed:
        _need(calls, "channel scales")
        if settings.stats_ema is not None and ranks.size() > 1:
            raise AttarError(
                "a running average of channel maxima depends on the order of samples, which several processes share",
                where="quantize.stats_ema",
                fix="Leave it out, or use one process",
            )
        found = collect_input_stats(
            run, calls, transformed, ema=settings.stats_ema, rotations=rotations, shifts=shifts
        )
        maxima = {name: ranks.max_(found[name]) for name in transformed}
    return InputFacts(samples, shifts, rotations, maxima)


def _need(calls: Sequence[Any], what: str) -> None:
    if not calls:
        raise AttarError(f"{what} need calibration samples")


def wrap_linears(
    module: nn.Module,
    plans: Mapping[str, LayerPlan],
    linears: Mapping[str, nn.Module],
    inputs: InputFacts,
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    settings: BlockSettings,
    seed: str,
    types: Mapping[str, torch.dtype] | None = None,
) -> dict[str, QuantizedLinear]:
    """Puts a QuantizedLinear around every planned linear, and returns them.

    Plain layers get neither transforms nor clipping. linears: the planned ones by name. inputs: of these and perhaps of
    others, by `input_facts` with the same settings and seed. types: that the weights of the packed model will have, by
    their names, where it is another than now. Otherwise as `quantize_block`.
    """
    layers, types = {}, types or {}
    for name, plan in plans.items():
        linear: Any = linears[name]
        transforms = []
        if plan.transformed:
            transforms = build_transforms(
                linear, inputs.maxima.get(name), settings.transforms,
                torch.Generator().manual_seed(seed_of(seed, name)),
                copy.deepcopy(inputs.rotations.get(name)),  # each layer learns its own
                inputs.samples.get(name),
            )  # fmt: skip
        layer = QuantizedLinear(
            linear, plan.weight_bits or 0, plan.act_bits, transforms, group_size=plan.group_size,
            weight_clip=settings.weight_clip and not plan.plain, act_clip=settings.act_clip,
            clip_start=settings.clip_start, weight_format=plan.weight_format, act_format=plan.act_format,
            train_levels=settings.train_levels and not plan.plain, shift=inputs.shifts.get(name),
            act_groups=plan.act_groups, clip_groups=settings.clip_groups, deployed=types.get(f"{name}.weight"),
        )  # fmt: skip
        replace_module(module, name, layer)
        layers[name] = layer
    blind = settings.low_rank is not None and not settings.low_rank.sees_rounding
    later = {name for name, plan in plans.items() if plan.low_rank and plan.row_bits is None and blind}
    if settings.clip_search:
        search_clips(layers[name] for name, plan in plans.items() if not plan.plain and name not in later)
    if settings.row_bits is not None:
        _mix_rows(layers, plans, run, calls, settings.row_bits, seed, settings.clip_search)
    if settings.low_rank is not None:
        _start_branches(layers, plans, run, calls, settings.low_rank, seed)
    if settings.clip_search:  # other bits, or another weight, are rounded now
        search_clips(
            layers[name] for name, plan in plans.items() if plan.low_rank or plan.row_bits is not None
        )
    return layers


def search_clips(layers: Iterable[QuantizedLinear]) -> None:
    """Searched clipping, of which all processes take the first one's."""
    found = list(layers)
    for layer in found:
        layer.search_clip()
    ranks.same_([layer.quantizer.clip_logit for layer in found if layer.quantizer.clip_logit is not None])


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
