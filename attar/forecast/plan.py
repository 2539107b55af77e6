"""`attar plan`: a recipe's speed-up, size and calibration on some hardware, from the architecture alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attar.candidates import presume
from attar.errors import AttarError
from attar.forecast.architecture import Architecture
from attar.forecast.calibration import forecast_calibration
from attar.forecast.calls import (
    ONE_BRANCH,
    Size,
    decode,
    encode,
    fixed_side,
    latent_of,
    makes_images,
    text_length,
    transformer_call,
)
from attar.forecast.counts import Counts, count_module, count_transformer
from attar.forecast.hardware import Hardware, find_hardware
from attar.forecast.latency import amdahl, arithmetic_bound, predict_latency, quantized_counts
from attar.forecast.measure import measure_cpu
from attar.forecast.sizes import planned_sizes
from attar.forecast.verdict import verdict
from attar.planning import plan_components
from attar.quantize.plan import LayerPlan
from attar.recipe import Recipe
from attar.settings import transform_settings


def hardware_for(name: str, peaks: Mapping[str, float]) -> Hardware:
    """An accelerator of the table by name, or "cpu": this machine, measured where `peaks` does not say.

    Raises AttarError for an unknown name.
    """
    return measure_cpu(peaks) if name == "cpu" else find_hardware(name, peaks)


def size_for(
    architecture: Architecture, resolution: str | None, frames: int | None, text_tokens: int | None
) -> Size:
    """The size asked for, filled up with the model's own.

    Raises AttarError for a resolution that is not WIDTHxHEIGHT, and where neither says a number.
    """
    default, side = architecture.default, fixed_side(architecture)
    width, height = default.get("width") or side, default.get("height") or side
    if resolution is not None:
        parts = resolution.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            what = f"{resolution!r} is no resolution"
            raise AttarError(what, where="--resolution", fix="Write WIDTHxHEIGHT, e.g. 832x480")
        width, height = map(int, parts)
    if not width or not height:
        raise AttarError("the model does not say its resolution", fix="Add --resolution WIDTHxHEIGHT")
    frames = frames or default.get("frames") or (1 if makes_images(architecture) else None)
    if not frames:
        raise AttarError("the model does not say its number of frames", fix="Add --frames N")
    return Size(width, height, frames, text_length(architecture, text_tokens))


def count_step(architecture: Architecture, size: Size) -> dict[str, Counts]:
    """Counts of one forward of each transformer, for one branch of guidance. Raises AttarError for sizes that do not
    fit."""
    latent = latent_of(architecture, size)
    return {
        name: count_transformer(part, transformer_call(architecture, name, latent, size.text_tokens))
        for name, part in architecture.transformers.items()
    }


def plan_model(
    architecture: Architecture,
    recipe: Recipe,
    hardware: Hardware,
    size: Size,
    steps: int | None = None,
    guidance: bool | None = None,
) -> dict[str, Any]:
    """Everything that `attar plan` shows, as JSON-able values in FLOP, bytes and seconds.

    steps: denoising steps; default: the model's. guidance: whether a step runs two branches; default: as the
    pipeline does where the model asks for guidance or says nothing. Where a pipeline has two experts a step
    is one of the first. Under a budget the bits are presumed ones that keep to it.
    Raises AttarError for whatever does not fit.
    """
    recipe.refuse_autoencoder("the forecast")
    first, transformer = next(iter(architecture.transformers.items()))
    steps = int(steps or architecture.default.get("steps", 50))
    if guidance is None:
        guidance = architecture.default.get("guidance", True) and type(transformer).__name__ not in ONE_BRANCH
    branches = 2 if guidance else 1
    presumed, _ = presume(architecture.transformers, recipe)
    plans = plan_components(architecture.transformers, presumed)
    counts = {name: c.times(branches) for name, c in count_step(architecture, size).items()}
    before = counts[first]
    after = quantized_counts(before, plans[first], transform_settings(recipe), hardware)
    seconds = {
        "original": predict_latency(before, hardware),
        "recipe": predict_latency(after, hardware.running_packed()),
    }
    ideal = hardware.ideal()
    around = _around(architecture, size, hardware, branches)
    calibration = forecast_calibration(
        counts, plans, architecture.modules, recipe, hardware, steps, seconds["original"]["total"]
    )
    names = [p.name for p in plans[first] if not p.skipped]
    latent = latent_of(architecture, size)
    result: dict[str, Any] = {
        "model": architecture.name,
        "title": architecture.title,
        "recipe": recipe.name,
        "bits": recipe.bits,
        "budget": None if recipe.allocate is None else recipe.allocate.budget,
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in architecture.modules.items()},
        "size": {**vars(size), "latent": [latent.frames, latent.height, latent.width]},
        "steps": steps,
        "branches": branches,
        "step": {
            "flops": before.flops(),
            "bytes": before.bytes(),
            "shares": {part: before.share(part) for part in ("linear", "attention", "rest")},
            "parts": _parts(before),
        },
        "around": around,
        "hardware": {
            "name": hardware.name,
            "title": hardware.title,
            "rates": dict(hardware.rates),
            "bandwidth": hardware.bandwidth,
            "memory": hardware.memory,
            "efficiency": dict(hardware.efficiency),
            "sources": dict(hardware.sources),
        },
        "formats": _formats(after, plans[first]),
        "seconds_per_step": seconds,
        "speedup": {
            "forecast": seconds["original"]["total"] / seconds["recipe"]["total"],
            "perfect_kernels": predict_latency(before, ideal)["total"]
            / predict_latency(after, ideal)["total"],
            "bound": arithmetic_bound(before, after, hardware),
            "linears_free": amdahl(before, {"linear": math.inf}, names),
        },
        "bytes": planned_sizes(architecture.transformers, plans, presumed),
        "calibration": calibration,
    }
    result["verdict"] = verdict(result, plans[first])
    return result


def _parts(counts: Counts) -> list[dict[str, Any]]:
    total = counts.flops()
    return [
        {"part": part, "role": role, "flops": flops, "share": flops / total, "bytes": moved}
        for part in ("linear", "attention", "rest")
        for role, (flops, moved) in counts.by_role(part).items()
    ]


def _formats(counts: Counts, plans: list[LayerPlan]) -> dict[str, float]:
    """Share of the planned linears' arithmetic in each format."""
    known = {p.name for p in plans if not p.skipped}
    sums: dict[str, float] = {}
    for o in counts.operations:
        if o.part == "linear" and o.name in known:
            sums[o.format] = sums.get(o.format, 0.0) + o.flops
    total = sum(sums.values())
    return {k: v / total for k, v in sums.items()}


def _around(
    architecture: Architecture, size: Size, hardware: Hardware, branches: int
) -> dict[str, dict[str, float]]:
    """FLOPs, bytes and seconds of what runs once a video: text encoders (one prompt a branch) and decoder."""
    tokens = size.text_tokens + architecture.default.get("template_tokens", 0)
    counted: dict[str, Counts] = {}
    for name, part in architecture.text_encoders.items():
        _, run = encode(part, tokens)
        counted[name] = count_module(part, run).times(branches)
    if architecture.vae is not None:
        counted["vae"] = count_module(
            architecture.vae, decode(architecture.vae, latent_of(architecture, size))
        )
    return {
        name: {"flops": c.flops(), "bytes": c.bytes(), "seconds": predict_latency(c, hardware)["total"]}
        for name, c in counted.items()
    }
