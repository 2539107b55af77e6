"""From a full-precision block to one that learns: channel statistics, and the transforms they start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.errors import AttarError
from attar.quantize.adaptive import InputSample, adaptive_rotation
from attar.quantize.transforms import (
    FixedHadamard,
    LearnedKronecker,
    LearnedOrthogonal,
    LearnedScale,
    LearnedTransform,
    smooth_scale,
)
from attar.quantize.watch import watching

ROTATIONS = ("none", "hadamard", "kronecker", "orthogonal", "adaptive")
ORDERS = ("scale_then_rotate", "rotate_then_scale")


@dataclass(frozen=True)
class TransformSettings:
    """Which transforms a layer gets and how they start.

    shift: take the mean of each channel out first. scale: learn a channel scale, started by SmoothQuant's rule with
    `alpha`. rotation: "kronecker" (trained),
    "orthogonal" (trained, full), "hadamard" (fixed), "adaptive" (fixed, by the layer's input, which has to reach
    `rotation_threshold` for the dual one, see adaptive.py) or "none". affine: let a Kronecker rotation stretch.
    rotation_init: see `rotation_start`. order: "scale_then_rotate" or "rotate_then_scale".
    Raises AttarError for names that do not exist.
    """

    scale: bool = True
    alpha: float = 0.5
    rotation: str = "kronecker"
    affine: bool = False
    rotation_init: str = "auto"
    order: str = "scale_then_rotate"
    rotation_threshold: float = 1.0
    shift: bool = False

    def __post_init__(self) -> None:
        if self.rotation not in ROTATIONS:
            raise AttarError(f"unknown rotation {self.rotation!r}", fix=f"Use one of {', '.join(ROTATIONS)}")
        if self.order not in ORDERS:
            raise AttarError(f"unknown order {self.order!r}", fix=f"Use one of {', '.join(ORDERS)}")
        if not 0 <= self.alpha <= 1:
            raise AttarError(f"alpha must lie in [0, 1], got {self.alpha}")


def build_rotation(
    d: int,
    settings: TransformSettings,
    generator: torch.Generator | None = None,
    sample: InputSample | None = None,
) -> LearnedTransform | None:
    """The rotation of a layer with d input channels, or None. sample: of its input, for the adaptive one.

    Raises AttarError when an adaptive rotation has no sample.
    """
    if settings.rotation == "adaptive":
        if sample is None:
            raise AttarError("an adaptive rotation needs calibration samples")
        return adaptive_rotation(sample, settings.rotation_threshold, generator)
    if settings.rotation == "kronecker":
        return LearnedKronecker(d, settings.affine, settings.rotation_init, generator)
    if settings.rotation == "orthogonal":
        return LearnedOrthogonal(d, settings.rotation_init, generator)
    return FixedHadamard(d, generator) if settings.rotation == "hadamard" else None


def build_transforms(
    linear: nn.Linear,
    absmax: Tensor | None,
    settings: TransformSettings,
    generator: torch.Generator | None = None,
    rotation: LearnedTransform | None = None,
    sample: InputSample | None = None,
) -> list[LearnedTransform]:
    """The transforms of one layer in the order in which they act.

    absmax: (d_in,) from `collect_input_stats`, of the layer's input, or of its *rotated* input for
    "rotate_then_scale"; then the rotation that it was gathered with has to be given. sample: of the layer's input, for
    an adaptive rotation. Raises AttarError when a
    scale is asked for without statistics, or a rotation comes second-hand without being given.
    """
    d, device = linear.in_features, linear.weight.device
    rotate_first = settings.order == "rotate_then_scale" and settings.scale and settings.rotation != "none"
    if rotate_first and rotation is None:
        raise AttarError("a scale behind a rotation needs the rotation that its statistics came from")
    if settings.scale and absmax is None:
        raise AttarError("a channel scale needs input statistics", fix="Run collect_input_stats first")
    scales = []
    if settings.scale and absmax is not None:
        weight = linear.weight.detach().float()
        if rotate_first and rotation is not None:
            with torch.no_grad():
                rotation.to(device)  # type: ignore[attr-defined]
                weight = rotation.weight_side(weight, rotation.matrices())
        start = smooth_scale(absmax.to(device), weight.abs().amax(0), settings.alpha)
        scales = [LearnedScale(start).to(device)]
        if sample is not None and not rotate_first:
            sample = sample.scaled(start)
    if rotation is None:
        rotation = build_rotation(d, settings, generator, sample)
    rotations = [] if rotation is None else [rotation.to(device)]  # type: ignore[attr-defined]
    return [*rotations, *scales] if rotate_first else [*scales, *rotations]


def collect_input_means(
    run: Callable[[Any], Any], calls: Iterable[Any], linears: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Mean of every input channel of every layer, over all tokens of the calls of all processes.

    run: runs the block on one call. linears: name → layer inside that block. Returns name → (d_in,) float32. Raises
    AttarError for a layer that no call reached, or where a mean is not finite.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(linears, 0)

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)  # (tokens, d)
        total = x.sum(0, dtype=torch.float64)
        sums[name] = sums[name] + total if name in sums else total
        counts[name] += len(x)

    with watching(linears, see):
        for call in calls:
            run(call)
    means = {}
    for name in linears:
        (count,) = ranks.sums(counts[name])
        if not count:
            raise AttarError(
                "a layer was not reached by any calibration call",
                where=name,
                fix="Skip it, or calibrate with calls that use it",
            )
        linear: Any = linears[name]
        none = torch.zeros(linear.in_features, dtype=torch.float64, device=linear.weight.device)
        own: Tensor = sums.get(name, none)
        means[name] = (ranks.sum_(own) / count).float()
        if not bool(torch.isfinite(means[name]).all()):
            raise AttarError(
                "a channel's mean is not finite", where=name, fix="Check the block's inputs for NaN"
            )
    return means


def collect_input_stats(
    run: Callable[[Any], Any],
    calls: Iterable[Any],
    linears: Mapping[str, nn.Module],
    *,
    ema: float | None = None,
    rotations: Mapping[str, LearnedTransform] | None = None,
    shifts: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Absolute maximum of every input channel of every layer, in one pass over the calls.

    run: runs the block on one call. linears: name → layer inside that block. ema: None takes the maximum over
    all calls; a momentum (0.95) takes an exponential moving average of each call's statistic, which is itself
    the maximum over tokens and the mean over the batch. shifts, rotations: name → what is taken from the input, and
    the rotation that it goes through, first.
    Returns name → (d_in,) float32. Raises AttarError for a layer that no call reached.
    """
    stats: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        x = x.detach().float()
        if shifts:
            x = x - shifts[name].to(x.device)
        rotation = None if rotations is None else rotations.get(name)
        if rotation is not None:
            x = rotation(x, rotation.matrices())
        x = x.abs().reshape(x.shape[0], -1, x.shape[-1]).amax(1)  # (B, …, d) -> (B, d)
        value = x.amax(0) if ema is None else x.mean(0)
        seen[name] = torch.maximum(seen[name], value) if name in seen else value

    with watching(linears, see):
        for call in calls:
            seen.clear()
            run(call)
            for name, value in seen.items():
                if name not in stats:
                    stats[name] = value
                elif ema is None:
                    stats[name] = torch.maximum(stats[name], value)
                else:
                    stats[name] = ema * stats[name] + (1 - ema) * value
    missing = [name for name in linears if name not in stats]
    if missing:
        raise AttarError(
            f"{len(missing)} layers were not reached by any calibration call",
            where=missing[0],
            fix="Skip these layers, or calibrate with calls that use them",
        )
    return stats
