"""The command line: parses, calls, prints. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from safetensors import SafetensorError

from attar.errors import AttarError
from attar.files import check_writable, file_error, named_path

app = typer.Typer(
    help="attar makes generative vision models small and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="List the recipes, or show one.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")

Model = Annotated[str, typer.Argument(help="a built-in name, a diffusers folder, or a hub id")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one)")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: float32 on CPU)")]
Seed = Annotated[int, typer.Option(min=0, max=2**61, help="of noise, selection, rotations and order")]
NoiseSeed = Annotated[int, typer.Option(min=0, max=2**61, help="of the noise; prompt i uses seed + i")]
Prompts = Annotated[
    Path | None, typer.Option(parser=named_path, metavar="FILE", help="text file, one prompt a line")
]
Height = Annotated[int | None, typer.Option(min=1, help="pixels (default: the model's)")]
Width = Annotated[int | None, typer.Option(min=1, help="pixels (default: the model's)")]
Frames = Annotated[int | None, typer.Option(min=1, help="number of frames (default: the model's)")]
Steps = Annotated[int | None, typer.Option(min=1, help="denoising steps (default: the model's)")]


def _version(wanted: bool) -> None:
    if wanted:
        from attar import __version__

        print(f"attar {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def _one_job(command: Callable[..., None]) -> Callable[..., None]:
    """All processes that a launcher has started are one job of this command; one alone makes a dry run."""

    @functools.wraps(command)
    def together(**options: Any) -> None:
        from attar import ranks

        if (
            "WORLD_SIZE" not in os.environ
            and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
        ):
            _note("accelerate started one process only; on CPUs use torchrun, or its option --multi_gpu")
        if not options["dry_run"]:
            with ranks.joined(options["device"]):
                command(**options)
        elif os.environ.get("RANK", "0") == "0":
            command(**options)

    return together


@app.command()
@_one_job
def compress(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", parser=named_path, metavar="FOLDER", help="folder of the compressed model"
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="published name or YAML file; see `attar recipes`")
    ] = "attar-ptq",
    weights: Annotated[int | None, typer.Option(help="bits of weights")] = None,
    acts: Annotated[int | None, typer.Option(help="bits of activations")] = None,
    text_encoder_weights: Annotated[
        int | None, typer.Option(help="bits of the text encoders' weights (default: left as they are)")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="override, e.g. reconstruct.epochs=5")
    ] = None,
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
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="read weights block by block, or load the pipeline whole (default: what fits)",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace a compressed model that is there already")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan and the forecast, change nothing")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compress a pipeline's transformers, and its text encoders if asked for. A killed run can be started again."""
    from attar import conductor, ranks
    from attar.forecast.dry_run import forecast_job, forecast_text
    from attar.models.memory import choose, open_pipeline
    from attar.models.source import find_source, read_prompts
    from attar.progress import RichProgress, SilentProgress
    from attar.recipe import load_recipe

    bits = {
        "quantize.weights": weights,
        "quantize.acts": acts,
        "text_encoder.weights": text_encoder_weights,
    }
    chosen = load_recipe(recipe, {**_assignments(set_), **_given(bits)})
    if output is None and not dry_run:
        raise AttarError("no output folder was given", fix="Add -o FOLDER, or --dry-run to see the plan only")
    precision = _dtype(dtype)
    given = None if prompts is None else read_prompts(prompts)
    generation = _given({"height": height, "width": width, "num_frames": frames})
    source = find_source(model)
    choice = ranks.first(
        lambda: choose(source, chosen.needs_data, precision, device, stream, processes=ranks.here())
    )
    _note(f"weights {'streamed' if choice.streamed else 'in memory'}: {choice.reason}")
    if dry_run:
        pipe = open_pipeline(source, choice, precision, device)
        result = forecast_job(pipe, source, chosen, given, generation)
        _emit(result) if as_json else print(forecast_text(result))
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
        _note(f"{ranks.size()} processes: {conductor.division(chosen)}")
    pipe = open_pipeline(source, choice, precision, device)
    plans = {
        n: conductor.plan_component(t, chosen) for n, t in conductor.transformer_components(pipe).items()
    }
    text = text_encoder_bytes(pipe, plan_text_encoders(pipe, chosen), source)
    progress = RichProgress() if ranks.is_first() else SilentProgress()
    pipe = conductor.run(pipe, source, chosen, work, given, generation, seed, progress)
    if not ranks.is_first():
        return
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
        "text_encoder_bytes": text,
        "seconds": {k: round(v, 1) for k, v in pipe.attar_compression.seconds.items()},
        "block_errors": {
            name: [[b["error_before"], b["error_after"]] for b in part["blocks"]]
            for name, part in pipe.attar_compression.components.items()
        },
    }
    if as_json:
        _emit(summary)
    else:
        sizes = f"{dense / 1e6:.1f} → {packed / 1e6:.1f} MB ({dense / packed:.2f}×)"
        print(f"{output}: {chosen.name} {chosen.bits}, block linears {sizes}")
        for name, (before, after) in text.items():
            print(f"{name}: {before / 1e6:.1f} → {after / 1e6:.1f} MB in its files")
        following = shlex.join(["attar", "compare", model, str(output), "-o", f"{target.name}-report"])
        print(f"resume data in {place} can be deleted; next: {following}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Argument(help="one or more sentences")],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            parser=named_path,
            metavar="FILE",
            help="an .mp4 file (numbered for several prompts)",
        ),
    ] = Path("out.mp4"),
    seed: NoiseSeed = 0,
    steps: Steps = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="classifier-free guidance scale")] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    fps: Annotated[float | None, typer.Option(min=0.1, help="of the file (default: the model's)")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Generate videos with any pipeline, compressed or not."""
    from attar.evaluate.generate import generate as make
    from attar.evaluate.video import save_video, to_frames
    from attar.models.source import find_source, load_pipeline
    from attar.progress import RichProgress
    from attar.runtime.backend import backend_description
    from attar.runtime.layers import packed_layers

    if output.suffix != ".mp4":
        raise AttarError("the output is not an .mp4 file", where=str(output), fix="Name it something.mp4")
    check_writable(output.parent)
    source = find_source(model)
    pipe = load_pipeline(source, dtype=_dtype(dtype), device=device)
    if any(packed_layers(part) for part in (pipe.components.values()) if hasattr(part, "named_modules")):
        print(f"backend {backend_description(pipe.device)}", file=sys.stderr)
    call = source.call_arguments(
        num_inference_steps=steps, guidance_scale=guidance, height=height, width=width, num_frames=frames
    )
    total = int(call.get("num_inference_steps", 50)) * len(prompt)
    with RichProgress().task("generate", total) as advance:
        made = make(pipe, prompt, seed=seed, call=call, step=lambda done: advance(done))
    written = []
    for i, (sentence, clip) in enumerate(zip(prompt, to_frames(made.videos), strict=True)):
        path = output if len(prompt) == 1 else output.with_name(f"{output.stem}-{i}{output.suffix}")
        meta = {"prompt": sentence, "seed": seed + i, "model": source.name, **{k: v for k, v in call.items()}}
        save_video(clip, path, fps or source.fps, max(1, 192 // clip.shape[2]), meta)
        written.append(
            {"file": str(path), "prompt": sentence, "seed": seed + i, "seconds": round(made.seconds[i], 2)}
        )
    if as_json:
        _emit(written)
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
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Videos side by side from the same noise, with every figure, as one HTML page."""
    from attar.calibration.prompts import GENERAL_PROMPTS
    from attar.evaluate.compare import compare as run
    from attar.models.source import find_source, read_prompts
    from attar.progress import RichProgress

    original, small = find_source(reference), find_source(compressed)
    assert original.folder is not None
    check_writable(output)
    own = original.folder / "evaluation_prompts.txt"
    chosen = (
        read_prompts(prompts) if prompts else read_prompts(own) if own.is_file() else list(GENERAL_PROMPTS)
    )
    data = run(
        original, small, chosen[:count], output, seed=seed,
        overrides={"num_inference_steps": steps}, dtype=_dtype(dtype), device=device, progress=RichProgress(),
    )  # fmt: skip
    if as_json:
        print((output / "report.json").read_text(encoding="utf-8"), end="")
    else:
        values = [pair.psnr for pair in data.pairs if pair.psnr is not None]
        print(f"{output / 'index.html'}: {len(data.pairs)} pairs, PSNR {sum(values) / len(values):.2f} dB")


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(help="a real shape (wan-14b, hunyuan, ...), a built-in name, or a diffusers folder"),
    ],
    gpu: Annotated[str, typer.Option(help="h200, h100, a100, 4090, 5090, b200, or cpu, which is measured")],
    recipe: Annotated[
        str, typer.Option(help="published name or YAML file; see `attar recipes`")
    ] = "attar-ptq",
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
    text_tokens: Annotated[int | None, typer.Option(min=1, help="length of the text")] = None,
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

    bits = _given({"quantize.weights": weights, "quantize.acts": acts})
    chosen = load_recipe(recipe, {**_assignments(set_), **bits})
    architecture = find_architecture(model)
    size = size_for(architecture, resolution, frames, text_tokens)
    hardware = hardware_for(gpu, parse_peaks(peak or []))
    result = plan_model(architecture, chosen, hardware, size, steps, guidance)
    _emit(result) if as_json else print_plan(result)


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="a compressed folder; or a built-in name or folder, packed here by a recipe"),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="instead: a real model's shapes with random weights, e.g. wan-1.3b")
    ] = None,
    recipe: Annotated[str, typer.Option(help="whose bits and transforms are packed")] = "attar-ptq",
    weights: Annotated[int | None, typer.Option(help="bits of weights")] = None,
    acts: Annotated[int | None, typer.Option(help="bits of activations")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="override, e.g. quantize.rotation=hadamard")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="video tokens of one forward")] = 2048,
    text_tokens: Annotated[int | None, typer.Option(min=1, help="length of the text")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="rounds, in which dense and packed take turns")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's)")] = None,
    backend: Annotated[str | None, typer.Option(help="reference or cpu (default: the fastest)")] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="of the dense blocks that are compared with")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Measure latency, memory and size of packed blocks beside dense ones, here and in one run."""
    import torch

    from attar.bench.command import bench as measure
    from attar.bench.table import print_bench
    from attar.models.source import check_device
    from attar.recipe import load_recipe
    from attar.runtime.backend import use_backend

    if (model is None) == (shape is None):
        raise AttarError("nothing to measure is named", fix="Give a model, or --shape")
    bits = _given({"quantize.weights": weights, "quantize.acts": acts})
    chosen = load_recipe(recipe, {**_assignments(set_), **bits})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    with use_backend(backend) if backend is not None else nullcontext():
        name = model if model is not None else shape
        result = measure(str(name), chosen, tokens, text_tokens, rounds, _dtype(dtype), device)
    _emit(result) if as_json else print_bench(result)


@recipes_app.callback()
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """List the recipes; `attar recipes show NAME` prints one with every setting."""
    if context.invoked_subcommand is not None:
        return
    from attar.recipe import DEFAULT_RECIPE, load_recipe, recipe_names

    rows = [load_recipe(name) for name in recipe_names()]
    if as_json:
        _emit(
            [{"name": r.name, "summary": r.summary, "paper": r.paper.url if r.paper else None} for r in rows]
        )
        return
    for r in rows:
        mark = " (default)" if r.name == DEFAULT_RECIPE else ""
        print(
            f"{r.name}{mark}\n    {r.summary}" + (f"\n    {r.paper.title}, {r.paper.url}" if r.paper else "")
        )


@recipes_app.command()
def show(
    name: Annotated[str, typer.Argument(help="published name or YAML file")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="override, e.g. quantize.weights=3")] = None,
    as_json: Json = False,
) -> None:
    """Print a recipe in resolved form: every key with its value."""
    from attar.recipe import load_recipe

    recipe = load_recipe(name, _assignments(set_))
    _emit(recipe.model_dump()) if as_json else print(recipe.to_yaml(), end="")


def _note(message: str) -> None:
    """A line on stderr, once for all processes."""
    from attar import ranks

    if ranks.is_first():
        print(message, file=sys.stderr)


def _assignments(pairs: list[str] | None) -> dict[str, Any]:
    """key=value pairs, values read as YAML."""
    found: dict[str, Any] = {}
    for pair in pairs or []:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise AttarError(
                f"{pair!r} is no assignment", where="--set", fix="Write KEY=VALUE, e.g. reconstruct.epochs=5"
            )
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise AttarError(f"the value of {key} cannot be read", where="--set") from error
    return found


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _dtype(name: str | None) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise AttarError(f"unknown dtype {name!r}", where="--dtype", fix=f"Use one of {', '.join(known)}")
    return None if name is None else known[name]


def _emit(content: Any) -> None:
    print(json.dumps(_json(content), indent=1, allow_nan=False))


def _json(value: Any) -> Any:
    """The value with what JSON lacks as text: infinities and NaN, paths."""
    if isinstance(value, dict):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    plain = (
        value is None
        or isinstance(value, (bool, int, str))
        or (isinstance(value, float) and math.isfinite(value))
    )
    return value if plain else str(value)


@contextmanager
def _calm() -> Iterator[None]:
    """Other libraries' advice stays out of our output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        yield


def main() -> None:
    """Entry point. Whatever a user can cause is one line on stderr and an exit code: 1; 2 for arguments that cannot
    be parsed; 130 for an interrupt."""
    try:
        with _calm():
            code = app(standalone_mode=False)
        sys.stdout.flush()
        if code == 130:
            raise KeyboardInterrupt
        if isinstance(code, int):
            sys.exit(code)
    except AttarError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted: run the same command again to go on", code=130)
    except BrokenPipeError:  # the reader of our output is gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, SafetensorError) as error:
        _fail(str(file_error(error)))
    except MemoryError:
        _fail("out of memory: compress a smaller model, or lower select.count, size or frames")
    except Exception as caught:
        error: Any = caught
        # the parser's own errors, whichever package they come from
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _fail(error.format_message(), code=error.exit_code)
        if hasattr(error, "exit_code"):
            sys.exit(error.exit_code)
        if type(error).__name__ == "Abort":
            _fail("interrupted", code=130)
        if type(error).__name__ == "OutOfMemoryError":
            _fail("the device is out of memory: use --device cpu, or lower select.count, size or frames")
        raise


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
