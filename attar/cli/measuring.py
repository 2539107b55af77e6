"""The commands that say what compression gives: plan forecasts, bench measures."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from attar.cli.app import app
from attar.cli.options import Device, Frames, Json, Steps, assignments, emit, torch_dtype, without_none
from attar.defaults import DEFAULT_RECIPE
from attar.errors import AttarError


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(help="a real shape (wan-14b, hunyuan, ...), a built-in name, or a diffusers folder"),
    ],
    gpu: Annotated[str, typer.Option(help="h200, h100, a100, 4090, 5090, b200, or cpu, which is measured")],
    recipe: Annotated[
        str, typer.Option(help="published name or YAML file; see `attar recipes`")
    ] = DEFAULT_RECIPE,
    weights: Annotated[int | None, typer.Option(help="bits of weights")] = None,
    acts: Annotated[int | None, typer.Option(help="bits of activations")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="override, e.g. quantize.rotation=hadamard")
    ] = None,
    resolution: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels (default: the model's)")
    ] = None,
    frames: Frames = None,
    steps: Steps = None,
    text_tokens: Annotated[int | None, typer.Option(min=1, max=1 << 20, help="length of the text")] = None,
    guidance: Annotated[
        bool | None,
        typer.Option("--guidance/--no-guidance", help="two branches a step (default: the model's)"),
    ] = None,
    peak: Annotated[
        list[str] | None,
        typer.Option(help="a rate in the place of the table's or a measured one, e.g. bf16=0.14 (TFLOP/s)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Forecast speed-up, size and calibration on some hardware; from the architecture alone, without weights."""
    from attar.forecast.architecture import find_architecture
    from attar.forecast.hardware import parse_peaks
    from attar.forecast.plan import hardware_for, plan_model, size_for
    from attar.forecast.table import print_plan
    from attar.recipe import load_recipe

    bits = without_none({"quantize.weights": weights, "quantize.acts": acts})
    chosen = load_recipe(recipe, {**assignments(set_), **bits})
    architecture = find_architecture(model)
    size = size_for(architecture, resolution, frames, text_tokens)
    hardware = hardware_for(gpu, parse_peaks(peak or []))
    result = plan_model(architecture, chosen, hardware, size, steps, guidance)
    emit(result) if as_json else print_plan(result)


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="a compressed folder; or a built-in name or folder, packed here by a recipe"),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="instead: a real model's shapes with random weights, e.g. wan-1.3b")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"whose bits and transforms are packed (default: {DEFAULT_RECIPE})")
    ] = None,
    weights: Annotated[int | None, typer.Option(help="bits of weights")] = None,
    acts: Annotated[int | None, typer.Option(help="bits of activations")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="override, e.g. quantize.rotation=hadamard")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="video tokens of one forward")] = 2048,
    text_tokens: Annotated[int | None, typer.Option(min=1, max=1 << 20, help="length of the text")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="rounds, in which dense and packed take turns")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's)")] = None,
    backend: Annotated[
        str | None, typer.Option(help="reference, cpu or triton (default: the fastest)")
    ] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="of the dense blocks that are compared with")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Measure latency, memory and size of packed blocks beside dense ones, here and in one run."""
    import torch

    from attar.bench.command import bench as measure
    from attar.bench.table import print_bench
    from attar.models.source import check_device, is_compressed
    from attar.recipe import load_recipe
    from attar.runtime.backend import use_backend

    if (model is None) == (shape is None):
        what = "nothing to measure is named" if model is None else "a model and a shape are named"
        raise AttarError(what, fix="Give a model, or --shape")
    bits = without_none({"quantize.weights": weights, "quantize.acts": acts})
    if (recipe is not None or set_ or bits) and model is not None and is_compressed(Path(model)):
        fix = "Leave out --recipe, --weights, --acts and --set"
        raise AttarError("the folder has bits of its own", where=model, fix=fix)
    chosen = load_recipe(recipe or DEFAULT_RECIPE, {**assignments(set_), **bits})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if threads is not None:
        if threads > (most := os.cpu_count() or 1):
            raise AttarError(
                f"there are {most} processors here", where="--threads", fix=f"Give at most {most}"
            )
        torch.set_num_threads(threads)
    with use_backend(backend) if backend is not None else nullcontext():
        name = model if model is not None else shape
        result = measure(str(name), chosen, tokens, text_tokens, rounds, torch_dtype(dtype), device)
    emit(result) if as_json else print_bench(result)
