"""The commands that make and look at compressed models: compress, generate, compare."""

from __future__ import annotations

import functools
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attar.cli.app import app
from attar.cli.options import (
    ActBits,
    Device,
    Dtype,
    Frames,
    Guidance,
    Height,
    Json,
    Model,
    NoiseSeed,
    Offload,
    Prompts,
    RecipeName,
    Seed,
    Settings,
    Steps,
    Stream,
    WeightBits,
    Width,
    assignments,
    call_options,
    emit,
    note,
    torch_dtype,
    without_none,
)
from attar.defaults import DEFAULT_RECIPE
from attar.errors import AttarError
from attar.files import check_writable, named_path

if TYPE_CHECKING:
    from attar.evaluate.statistics import Estimate


def one_job(command: Callable[..., None]) -> Callable[..., None]:
    """All processes that a launcher has started are one job of this command; one alone makes a dry run."""

    @functools.wraps(command)
    def together(**options: Any) -> None:
        from attar import ranks

        if (
            "WORLD_SIZE" not in os.environ
            and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
        ):
            note("accelerate started one process only; on CPUs use torchrun, or its option --multi_gpu")
        if not options.get("dry_run"):
            with ranks.joined(options["device"]):
                command(**options)
        elif os.environ.get("RANK", "0") == "0":
            command(**options)

    return together


@app.command()
@one_job
def compress(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", parser=named_path, metavar="FOLDER", help="folder of the compressed model"
        ),
    ] = None,
    recipe: RecipeName = DEFAULT_RECIPE,
    weights: WeightBits = None,
    acts: ActBits = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="bits for each layer under it: 0.30x (size), 3.2bits (mean), 0.5dB (loss), or same"
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(parser=named_path, metavar="FILE", help="bits for each layer, from `attar allocate`"),
    ] = None,
    text_encoder_weights: Annotated[
        int | None, typer.Option(help="bits of the text encoders' weights (default: left as they are)")
    ] = None,
    set_: Settings = None,
    prompts: Prompts = None,
    workspace: Annotated[
        Path | None,
        typer.Option(parser=named_path, metavar="FOLDER", help="folder for resuming (default: OUTPUT.work)"),
    ] = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    device: Device = None,
    dtype: Dtype = None,
    stream: Stream = None,
    overwrite: Annotated[bool, typer.Option(help="replace a compressed model that is there already")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan and the forecast, change nothing")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compress a pipeline's transformers, or its autoencoder with a recipe for that (zeroq, genie), and its text
    encoders if asked for. A killed run can be started again."""
    from attar import conductor, ranks
    from attar.allocation import PLAN
    from attar.forecast.dry_run import forecast_job, forecast_text
    from attar.models.memory import choose, open_pipeline
    from attar.models.source import find_source, read_prompts
    from attar.planning import with_plan
    from attar.progress import RichProgress, SilentProgress
    from attar.recipe import load_recipe

    bits = {
        "quantize.weights": weights,
        "quantize.acts": acts,
        "text_encoder.weights": text_encoder_weights,
        "allocate.budget": budget,
    }
    overrides = {**assignments(set_), **without_none(bits)}
    chosen = load_recipe(recipe, overrides)
    layers = None if plan is None else conductor.read_plan_for(plan, overrides)
    if output is None and not dry_run:
        raise AttarError("no output folder was given", fix="Add -o FOLDER, or --dry-run to see the plan only")
    precision = torch_dtype(dtype)
    given = None if prompts is None else read_prompts(prompts)
    generation = without_none({"height": height, "width": width, "num_frames": frames})
    source = find_source(model, alone=chosen.synthesize is not None)
    choice = ranks.first(
        lambda: choose(
            source,
            chosen.traced is not None,
            precision,
            device,
            stream,
            processes=ranks.here(),
            decodes=chosen.synthesize is not None,
        )
    )
    note(f"weights {'streamed' if choice.streamed else 'in memory'}: {choice.reason}")
    if chosen.traced is None and (given is not None or generation):
        note(f"the recipe {chosen.name} runs the pipeline on no prompt: prompts and sizes change nothing")
    if dry_run:
        pipe = open_pipeline(source, choice, precision, device)
        chosen = (
            chosen if layers is None else with_plan(chosen, layers, conductor.components_of(pipe, chosen))
        )
        result = forecast_job(pipe, source, chosen, given, generation)
        emit(result) if as_json else print(forecast_text(result))
        return
    assert output is not None
    from attar.save import check_destination, linear_bytes, save_compressed
    from attar.text_encoder import plan_text_encoders, text_encoder_bytes
    from attar.workspace import Workspace

    target = Path(os.path.realpath(output))
    place = workspace or Path(f"{target}.work")
    check_destination(target, overwrite, place, source)
    work = Workspace(place)
    if ranks.size() > 1:
        note(f"{ranks.size()} processes: {conductor.division(chosen)}")
    pipe = open_pipeline(source, choice, precision, device)
    chosen = chosen if layers is None else with_plan(chosen, layers, conductor.components_of(pipe, chosen))
    text = text_encoder_bytes(pipe, plan_text_encoders(pipe, chosen), source)
    progress = RichProgress() if ranks.is_first() else SilentProgress()
    pipe = conductor.run(pipe, source, chosen, work, given, generation, seed, progress)
    if not ranks.is_first():
        return
    plans, allocation = pipe.attar_compression.plans, pipe.attar_compression.allocation
    dense, packed = linear_bytes(pipe, plans)
    save_compressed(pipe, target, source, plans, work)
    summary = {
        "output": str(output),
        "workspace": str(place),
        "recipe": chosen.name,
        "bits": chosen.bits,
        "linear_bytes_bf16": dense,
        "linear_bytes_packed": packed,
        "linear_ratio": round(dense / packed, 3),
        "allocation": None if allocation is None else vars(allocation),
        "text_encoder_bytes": text,
        "seconds": {k: round(v, 1) for k, v in pipe.attar_compression.seconds.items()},
        "block_errors": {
            name: [[b["error_before"], b["error_after"]] for b in part["blocks"]]
            for name, part in pipe.attar_compression.components.items()
        },
    }
    if as_json:
        emit(summary)
    else:
        sizes = f"{dense / 1e6:.1f} → {packed / 1e6:.1f} MB ({dense / packed:.2f}×)"
        print(f"{output}: {chosen.name} {chosen.bits}, block linears {sizes}")
        if allocation is not None:
            print(f"{output / PLAN}: {allocation.summary()}")
        for name, (before, after) in text.items():
            print(f"{name}: {before / 1e6:.1f} → {after / 1e6:.1f} MB in its files")
        following = shlex.join(["attar", "compare", model, str(output), "-o", f"{target.name}-report"])
        print(f"resume data in {place} can be deleted" + ("" if source.alone else f"; next: {following}"))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        list[str], typer.Argument(help="one or more sentences, or classes of a class-conditional model")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            parser=named_path,
            metavar="FILE",
            help="an .mp4 file, or .png for images (numbered for several prompts; default: out)",
        ),
    ] = None,
    seed: NoiseSeed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    fps: Annotated[float | None, typer.Option(min=0.1, help="of the file (default: the model's)")] = None,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = None,
    as_json: Json = False,
) -> None:
    """Generate videos or images with any pipeline, compressed or not."""
    from attar.evaluate.generate import generate as make
    from attar.evaluate.image import save_image
    from attar.evaluate.video import save_video, to_frames
    from attar.models.calls import conditioning, makes_videos, steps_of
    from attar.models.offload import computes_on
    from attar.models.source import find_source, load_pipeline
    from attar.progress import RichProgress
    from attar.runtime.describe import describe_backend

    if output is not None and output.suffix not in (".mp4", ".png"):
        fix = "Name it something.mp4, or something.png for images"
        raise AttarError("the output is not an .mp4 or .png file", where=str(output), fix=fix)
    source = find_source(model)
    video = source.pipeline_class is None or makes_videos(source.pipeline_class)
    suffix = ".mp4" if video else ".png"
    output = output or Path(f"out{suffix}")
    if output.suffix != suffix:
        what = f"the output is not {'an .mp4' if video else 'a .png'} file"
        raise AttarError(what, where=str(output), fix=f"Name it something{suffix}")
    if fps is not None and not math.isfinite(fps):
        raise AttarError(f"a video cannot have {fps} frames a second", where="--fps", fix="Give a number")
    if fps is not None and not video:
        raise AttarError("images have no frame rate", where="--fps", fix="Leave it out")
    check_writable(output.parent)
    pipe = load_pipeline(source, dtype=torch_dtype(dtype), device=device, offload=offload)
    backend = describe_backend(pipe.components.values(), computes_on(pipe))
    if backend is not None:
        print(f"backend {backend}", file=sys.stderr)
    call = source.call_arguments(**call_options(steps, guidance, height, width, frames))
    steps_each = steps_of(pipe, call)
    for sentence in prompt:
        conditioning(pipe, sentence)  # an unknown class is refused before the first is made
    written = []
    with RichProgress().task("generate", steps_each * len(prompt)) as advance:
        for i, sentence in enumerate(prompt):  # each is kept as soon as it is there
            before = i * steps_each
            made = make(
                pipe,
                [sentence],
                seed=seed + i,
                call=call,
                step=lambda done, before=before: advance(before + done),
            )
            clip = to_frames(made.videos)[0]
            path = output if len(prompt) == 1 else output.with_name(f"{output.stem}-{i}{output.suffix}")
            meta = {"prompt": sentence, "seed": seed + i, "model": source.name, **call}
            upscale = max(1, 192 // clip.shape[2])
            if video:
                save_video(clip, path, fps or source.fps, upscale, meta)
            else:
                save_image(clip[0], path, upscale, meta)
            written.append(
                {
                    "file": str(path),
                    "prompt": sentence,
                    "seed": seed + i,
                    "seconds": round(made.seconds[0], 2),
                }
            )
    if as_json:
        emit(written)
    else:
        for row in written:
            print(f"{row['file']}: {row['prompt']} (seed {row['seed']}, {row['seconds']} s)")


@app.command()
def compare(
    reference: Annotated[
        str, typer.Argument(help="the original: a built-in name, a diffusers folder, or a hub id")
    ],
    compressed: Annotated[str, typer.Argument(help="the folder that `attar compress` wrote")],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            parser=named_path,
            metavar="FOLDER",
            help="folder of the report; one that is there is replaced",
        ),
    ] = Path("report"),
    prompts: Prompts = None,
    count: Annotated[int, typer.Option("-n", min=1, help="how many prompts at most")] = 8,
    seed: NoiseSeed = 1000,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = None,
    as_json: Json = False,
) -> None:
    """Videos or images side by side from the same noise, with every figure, as one HTML page."""
    from attar.calibration.prompts import GENERAL_PROMPTS
    from attar.evaluate.compare import compare as run
    from attar.evaluate.report_data import summarise
    from attar.models.source import find_source, read_prompts
    from attar.progress import RichProgress

    original, small = find_source(reference), find_source(compressed)
    assert original.folder is not None
    check_writable(output)
    own = original.folder / "evaluation_prompts.txt"
    chosen = (
        read_prompts(prompts) if prompts else read_prompts(own) if own.is_file()
        else original.classes or list(GENERAL_PROMPTS)
    )  # fmt: skip
    call = call_options(steps, guidance, height, width, frames)
    data = run(
        original, small, chosen[:count], output, seed=seed, overrides=call, dtype=torch_dtype(dtype), device=device,
        offload=offload, progress=RichProgress(),
    )  # fmt: skip
    if as_json:
        print((output / "report.json").read_text(encoding="utf-8"), end="")
    else:
        print(f"{output / 'index.html'}: {len(data.pairs)} pairs{_closeness(summarise(data.pairs).psnr)}")


def _closeness(found: Estimate | None) -> str:
    if found is None:
        return ""
    if math.isinf(found.mean):
        return ", all equal"
    return f", PSNR {found.mean:.2f} dB" + (f" and {found.infinite} equal" if found.infinite else "")
