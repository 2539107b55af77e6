"""The dry run of `attar compress`: plan, sizes, time and memory, with the model loaded and one step of it measured."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attar.calibration.trace import transformer_components
from attar.candidates import presume
from attar.conductor import calibration_prompts, traced_steps
from attar.errors import calling
from attar.finetuning import check_trainable
from attar.forecast.calibration import (
    BlockCost,
    allocation_seconds,
    calibration_memory,
    finetune_memory,
    finetune_seconds,
    learning_seconds,
)
from attar.forecast.sizes import planned_sizes
from attar.forecast.trial import Trial
from attar.models.adapter import Block, ModelAdapter
from attar.models.arithmetic import Arithmetic
from attar.models.block import bind
from attar.models.calls import conditioning, latents_only, makes_videos
from attar.models.source import Source, stored_dtypes
from attar.models.tree import tensors_of
from attar.models.weights import weights_of
from attar.planning import plan_components
from attar.pool import check_frames, check_pool
from attar.quantize.plan import LayerPlan
from attar.recipe import Recipe
from attar.runtime.clock import now
from attar.samples import catch_samples
from attar.save import plan_rows
from attar.settings import block_settings
from attar.text_encoder import plan_text_encoders, text_encoder_bytes


def forecast_job(
    pipe: Any,
    source: Source,
    recipe: Recipe,
    prompts: Sequence[str] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Plan, sizes in bytes, and an estimate of calibration seconds and peak bytes on this machine.

    Sizes are as exact as `planned_sizes`. "block_linears_*" count the quantized linears with their biases, these and
    everything else in bfloat16; "checkpoint" is what the transformers' files will hold, the floating-point rest in the
    types of the source. Under a budget they are those of a presumed choice that keeps to it, and the layers that are
    yet to be chosen for are marked. For time and memory one denoising step of the pipeline, and one training step of a
    copy of one block of each kind, are run and measured; the rest is arithmetic. Blocks are of one kind when they have
    the same class and their linears the same plan. Nothing of the pipeline is changed.
    Raises AttarError for everything that `compress` would refuse before its first step.
    """
    recipe.refuse_autoencoder("the forecast")
    components = transformer_components(pipe)
    presumed, free = presume(components, recipe)
    plans = plan_components(components, presumed)
    check_trainable(components, plans, recipe)
    text = plan_text_encoders(pipe, recipe)
    chosen = calibration_prompts(recipe, source, prompts)
    call = source.call_arguments(**(generation or {}))
    check_pool(recipe, chosen, traced_steps(recipe, pipe, call))
    check_frames(recipe, makes_videos(pipe))
    return {
        "recipe": recipe.name,
        "bits": recipe.bits,
        "budget": None if recipe.allocate is None else recipe.allocate.budget,
        "layers": [
            _row(name, plan, plan.name in free.get(name, ()))
            for name, part in {**plans, **text}.items()
            for plan in part
        ],
        "rows": [vars(row) for row in plan_rows(plans, presumed)],
        "bytes": {
            **planned_sizes(components, plans, presumed, _stored(components, source)),
            "text_encoders": text_encoder_bytes(pipe, text, source),
        },
        **_time_and_memory(pipe, components, plans, recipe, chosen, call),
    }


def _row(component: str, plan: LayerPlan, presumed: bool) -> dict[str, Any]:
    return {
        "component": component, "name": plan.name, "role": plan.role, "weights": plan.weight_bits,
        "acts": plan.act_bits, "bits": plan.bits, "presumed": presumed,
        "reason": "bits by measured sensitivity" if presumed else plan.reason,
    }  # fmt: skip


def _stored(components: Mapping[str, nn.Module], source: Source) -> dict[str, dict[str, torch.dtype]]:
    folder = source.folder
    return {} if folder is None else {name: stored_dtypes(folder / name) for name in components}


def _time_and_memory(
    pipe: Any,
    components: Mapping[str, nn.Module],
    plans: Mapping[str, list[LayerPlan]],
    recipe: Recipe,
    prompts: Sequence[str],
    call: dict[str, Any],
) -> dict[str, Any]:
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    # what is streamed lies on the meta device, and of it one block at a time is in memory
    resident = sum(t.nbytes for p in modules for t in [*p.parameters(), *p.buffers()] if not t.is_meta)
    traced = recipe.traced
    if traced is None:
        memory = calibration_memory(resident, components.values(), recipe)
        return {"seconds": 0.0, "trace_seconds": 0.0, "peak_bytes": int(memory.device), "measured_on": None}
    steps = traced_steps(recipe, pipe, call)
    chosen = recipe.select.count if recipe.needs_data and recipe.select is not None else 0
    first, branches, step_seconds = _one_step(pipe, components, prompts[0], call)
    epochs = block_settings(recipe).epochs
    learn = allocating = 0.0
    costs: defaultdict[str, list[BlockCost]] = defaultdict(list)  # of end-to-end training, by transformer
    parts = 1  # samples of a step, whose branches fit no batch then
    peaks, measured = [], [f"one denoising step ({step_seconds:.3g} s)"]
    adapters = {name: ModelAdapter.of(part) for name, part in components.items()}
    for (name, block), counts in _kinds(adapters, plans, first).items():
        adapter = adapters[name]
        adapter.observe(branches[0])
        samples = catch_samples(components[name], adapter, block, [branches])
        with weights_of(components[name]).opened(block.module):
            planned = _planned(block, plans[name])
            arithmetic = Arithmetic.of(components[name], recipe.precision)
            trial = Trial(block, planned, samples[0], recipe, arithmetic)
            cost = trial.learning()
            training = trial.training() if recipe.finetune is not None else None
        blocks = counts.total()
        if training is not None:
            for component, count in counts.items():
                costs[component] += [training] * count
        parts = max(parts, len(samples))
        if chosen:
            learn += learning_seconds([cost] * blocks, chosen * len(samples), epochs)
        else:
            learn += blocks * cost.once
        one = allocation_seconds(cost, planned, recipe, step_seconds / len(samples))
        allocating += blocks * one * len(samples)
        held = max(chosen, recipe.allocate.samples if recipe.allocate is not None else 0)
        memory = calibration_memory(
            resident, components.values(), recipe, held * len(samples),
            _bytes(samples[0].streams), _bytes(samples[0].constants), cost.saved + cost.anew,
        )  # fmt: skip
        peaks.append(memory.device + memory.host)
        if planned:
            step = cost.epoch if training is None else training.epoch
            what, seconds = ("training step", step) if step else ("forward", cost.forward)
            measured.append(f"one {what} of {name}.{block.name} ({seconds:.3g} s)")
    for known in costs.values():  # one transformer after the other
        learn += finetune_seconds(known, len(prompts) * steps * parts, recipe)
        memory = finetune_memory(resident, components.values(), recipe, known)
        peaks.append(memory.device + memory.host)
    tracing = len(prompts) * steps * step_seconds
    return {
        "seconds": round(tracing + allocating + learn, 1),
        "trace_seconds": round(tracing, 1),
        "allocate_seconds": round(allocating, 1),
        "peak_bytes": int(max(peaks)),
        "measured_on": f"{' and '.join(measured)} on this machine",
    }


def _kinds(
    adapters: Mapping[str, ModelAdapter], plans: Mapping[str, list[LayerPlan]], first: str
) -> dict[tuple[str, Block], Counter[str]]:
    """(component, one block) of each kind -> how many each component has; of `first` the block where that has one."""
    kinds: dict[Any, tuple[str, Block]] = {}
    counts: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    for name in sorted(adapters, key=lambda name: name != first):
        for block in adapters[name].blocks:
            planned = _planned(block, plans[name]).items()
            alike = tuple((path, dataclasses.replace(plan, name="")) for path, plan in planned)
            kind = type(block.module), alike
            kinds.setdefault(kind, (name, block))
            counts[kind][name] += 1
    return {example: counts[kind] for kind, example in kinds.items()}


def _planned(block: Block, plan: list[LayerPlan]) -> dict[str, LayerPlan]:
    """The plans of the block's linears by their names in it, without those that are kept; of groups of steps the widest
    bits, which cost what others do."""
    prefix = f"{block.name}."
    own = [p for p in plan if p.name.startswith(prefix) and not p.skipped]
    return {p.name.removeprefix(prefix): dataclasses.replace(p, act_groups=None) for p in own}


@torch.no_grad()
def _one_step(
    pipe: Any, components: Mapping[str, nn.Module], prompt: str, call: dict[str, Any]
) -> tuple[str, list[dict[str, Any]], float]:
    """(the component that runs first, its calls in one denoising step, the seconds of one).

    Two steps are run, since some pipelines take a single one for a distilled model's; the first one warms up.
    """
    calls: list[tuple[str, dict[str, Any], float]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls.append((name, bind(module, args, kwargs), now(pipe.device)))

        return hook

    handles = [
        part.register_forward_pre_hook(watch(name), with_kwargs=True) for name, part in components.items()
    ]
    try:
        generator = torch.Generator().manual_seed(0)
        options = {**call, "num_inference_steps": 2}
        with calling(pipe), latents_only(pipe) as undecoded:
            pipe(**conditioning(pipe, prompt), generator=generator, **undecoded, **options)
        ended = now(pipe.device)
    finally:
        for handle in handles:
            handle.remove()
    first, start = calls[0][0], calls[0][1].get("timestep")
    step = [given for name, given, _ in calls if name == first and _same_time(given.get("timestep"), start)]
    rest = calls[len(step) :]
    seconds = (ended - rest[0][2]) * len(step) / len(rest) if rest else ended - calls[0][2]
    return first, step, seconds


def _bytes(value: Any) -> int:
    return sum(t.nbytes for t in tensors_of(value))


def _same_time(one: Any, other: Any) -> bool:
    """Whether two calls are of one denoising step, as far as they say."""
    return not isinstance(one, Tensor) or bool((one.flatten()[0] == other.flatten()[0]).item())


def forecast_text(result: dict[str, Any]) -> str:
    """The forecast for people: a line for every linear, then sizes, time and memory."""
    from attar.evaluate.size import format_bytes

    rows = [("layer", "role", "bits", "why")]
    for row in result["layers"]:
        bits = f"~{row['bits']}" if row["presumed"] else row["bits"]
        rows.append((f"{row['component']}.{row['name']}", row["role"], bits, row["reason"] or ""))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    lines = ["  ".join([*(row[k].ljust(widths[k]) for k in range(3)), row[3]]).rstrip() for row in rows]
    sizes = result["bytes"]
    lines.append("")
    if any(row["presumed"] for row in result["layers"]):
        lines.append(
            f"budget {result['budget']}: the layers marked ~ get their bits by measured sensitivity; those above keep "
            "to it with equal sensitivity, and give the sizes"
        )
    lines += [
        f"{result['recipe']} {result['bits']}: block linears {format_bytes(sizes['block_linears_bf16'])} → "
        f"{format_bytes(sizes['block_linears_packed'])} ({sizes['linear_ratio']}×), with biases; whole transformer "
        f"{sizes['transformer_ratio']}× against bfloat16; {format_bytes(sizes['checkpoint'])} in its files",
    ]
    for name, (before, after) in sizes["text_encoders"].items():
        lines.append(f"{name}: {format_bytes(before)} → {format_bytes(after)} in its files, weights only")
    if result["measured_on"]:
        choosing = result["allocate_seconds"]
        lines.append(
            f"calibration about {_duration(result['seconds'])}, of which {_duration(result['trace_seconds'])} tracing"
            f"{f' and {_duration(choosing)} choosing bits' if choosing else ''}; "
            f"peak memory about {format_bytes(result['peak_bytes'])} beside the libraries"
        )
        lines.append(f"(from {result['measured_on']})")
    else:
        lines.append(
            f"no calibration data needed; peak memory about {format_bytes(result['peak_bytes'])} beside the libraries"
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
