"""What a compression will do, before anyone waits for it: the plan, the final size, the time and the peak memory."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attar.calibration.catch import catch_block_calls
from attar.calibration.trace import transformer_components
from attar.component import block_settings, transform_settings
from attar.conductor import calibration_prompts, check_pool, plan_component
from attar.errors import AttarError
from attar.models.adapter import ModelAdapter
from attar.models.block import bind, run_block
from attar.models.source import Source
from attar.quantize.plan import LayerPlan, forecast
from attar.recipe import Recipe
from attar.save import plan_rows


def forecast_job(
    pipe: Any, source: Source, recipe: Recipe, prompts: Sequence[str] | None = None
) -> dict[str, Any]:
    """Plan, sizes in bytes, and an estimate of calibration seconds and peak bytes on this machine.

    One denoising step of the pipeline and one training step of the first block are timed; everything else is
    arithmetic. Nothing of the pipeline is changed.
    """
    components = transformer_components(pipe)
    plans = {name: plan_component(part, recipe) for name, part in components.items()}
    chosen = calibration_prompts(recipe, source, prompts)
    call = source.call_arguments()
    check_pool(recipe, chosen, call)
    settings = transform_settings(recipe)
    dense = packed = rest = 0
    for name, part in components.items():
        for plan in plans[name]:
            if not plan.skipped:
                size = forecast(plan, settings)
                dense, packed = dense + size.dense, packed + size.packed
        whole = sum(p.numel() for p in part.parameters())
        inside = sum(
            p.in_features * p.out_features + (p.out_features if p.bias else 0)
            for p in plans[name]
            if not p.skipped
        )
        rest += 2 * (whole - inside)
    return {
        "recipe": recipe.name,
        "bits": recipe.bits,
        "layers": [_row(name, plan) for name in plans for plan in plans[name]],
        "rows": [vars(row) for row in plan_rows(plans)],
        "bytes": {
            "block_linears_bf16": dense,
            "block_linears_packed": packed,
            "rest_bf16": rest,
            "linear_ratio": round(dense / packed, 3) if packed else None,
            "transformer_ratio": round((dense + rest) / (packed + rest), 3),
        },
        **_time_and_memory(pipe, components, recipe, len(chosen), call),
    }


def _row(component: str, plan: LayerPlan) -> dict[str, Any]:
    return {
        "component": component, "name": plan.name, "role": plan.role, "weights": plan.weight_bits,
        "acts": plan.act_bits, "reason": plan.reason,
    }  # fmt: skip


def _time_and_memory(
    pipe: Any, components: dict[str, Any], recipe: Recipe, prompts: int, call: dict[str, Any]
) -> dict[str, Any]:
    model = sum(
        t.numel() * t.element_size()
        for part in pipe.components.values()
        if hasattr(part, "parameters")
        for t in part.parameters()
    )
    if not recipe.needs_data or recipe.trace is None or recipe.select is None:
        return {"seconds": 0.0, "peak_bytes": model, "measured_on": None}
    steps = recipe.trace.steps or call.get("num_inference_steps") or 50
    arguments, step_seconds = _one_step(pipe, components, call)
    first = next(iter(components.values()))
    adapter = ModelAdapter.of(first)
    block = adapter.blocks[0]
    caught = catch_block_calls(first, adapter, 0, arguments)[0].to(dtype=torch.float32)
    branches = len(arguments)
    block_seconds = _block_step(block.module, caught, block.outputs) * branches
    blocks = sum(len(ModelAdapter.of(part).blocks) for part in components.values())
    count = recipe.select.count
    learning = block_settings(recipe).learning
    epochs = learning.epochs if learning else 0
    # a training step costs about three forwards; each epoch is also measured once, and targets are made once
    learn = blocks * count * block_seconds * (epochs * (3 + 1) + 4)
    streams = sum(t.numel() * 4 for t in caught.streams.values()) * branches * count
    constants = (
        sum(t.numel() * 4 for t in caught.constants.values() if isinstance(t, Tensor)) * branches * count
    )
    open_block = max(sum(p.numel() for p in b.module.parameters()) for b in adapter.blocks) * 4 * 4
    return {
        "seconds": round(prompts * steps * step_seconds + learn, 1),
        "trace_seconds": round(prompts * steps * step_seconds, 1),
        "peak_bytes": int(model + 2 * streams + constants + open_block),
        "measured_on": f"one denoising step ({step_seconds:.3g} s) and one forward of {block.name} on this machine",
    }


@torch.no_grad()
def _one_step(
    pipe: Any, components: dict[str, Any], call: dict[str, Any]
) -> tuple[list[dict[str, Any]], float]:
    """(the transformer calls of one denoising step, its seconds)."""
    calls: list[dict[str, Any]] = []

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(bind(module, args, kwargs))

    handles = [part.register_forward_pre_hook(hook, with_kwargs=True) for part in components.values()]
    options = {**call, "num_inference_steps": 1}
    try:
        pipe(prompt="a test", output_type="latent", generator=torch.Generator().manual_seed(0), **options)
        first, _ = list(calls), calls.clear()
        started = time.perf_counter()
        pipe(prompt="a test", output_type="latent", generator=torch.Generator().manual_seed(0), **options)
        seconds = time.perf_counter() - started
    except (ValueError, TypeError) as error:
        raise AttarError(
            f"the pipeline rejects its arguments ({error})", where=type(pipe).__name__
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return first, seconds


@torch.no_grad()
def _block_step(module: Any, call: Any, outputs: tuple) -> float:
    best = math.inf
    device = next(module.parameters()).device
    dtype = next(module.parameters()).dtype
    call = call.to(device=device, dtype=dtype)
    for _ in range(3):
        started = time.perf_counter()
        run_block(module, call, outputs)
        best = min(best, time.perf_counter() - started)
    return best


def print_forecast(result: dict[str, Any]) -> None:
    """The forecast as tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    from attar.evaluate.size import format_bytes

    console = Console()
    table = Table(
        "layer", "role", "bits", "why", title=f"{result['recipe']} {result['bits']}", title_justify="left"
    )
    for row in result["layers"]:
        bits = "kept" if row["weights"] is None else f"W{row['weights']}A{row['acts'] or 16}"
        table.add_row(f"{row['component']}.{row['name']}", row["role"], bits, row["reason"] or "")
    console.print(table)
    sizes = result["bytes"]
    console.print(
        f"block linears {format_bytes(sizes['block_linears_bf16'])} → {format_bytes(sizes['block_linears_packed'])} "
        f"({sizes['linear_ratio']}×), whole transformer {sizes['transformer_ratio']}× against bfloat16",
        highlight=False,
    )
    if result["measured_on"]:
        console.print(
            f"calibration about {result['seconds'] / 60:.1f} min, of which {result['trace_seconds'] / 60:.1f} min "
            f"tracing; peak memory about {format_bytes(result['peak_bytes'])}\n(from {result['measured_on']})",
            highlight=False,
        )
    else:
        console.print("no calibration data needed", highlight=False)
