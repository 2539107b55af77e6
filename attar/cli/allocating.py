"""The command that chooses bits for each layer under a budget, and compresses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attar.cli.app import app
from attar.cli.compressing import one_job
from attar.cli.options import (
    ActBits,
    Device,
    Dtype,
    Frames,
    Height,
    Json,
    Model,
    Prompts,
    RecipeName,
    Seed,
    Settings,
    Stream,
    WeightBits,
    Width,
    assignments,
    emit,
    note,
    torch_dtype,
    without_none,
)
from attar.defaults import DEFAULT_RECIPE
from attar.errors import AttarError
from attar.files import check_writable, named_path


@app.command()
@one_job
def allocate(
    model: Model,
    budget: Annotated[
        str, typer.Option(help="0.30x (size of the linears), 3.2bits (mean), 0.5dB (loss), or same")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", parser=named_path, metavar="FILE", help="the plan, a YAML file")
    ] = Path("plan.yaml"),
    recipe: RecipeName = DEFAULT_RECIPE,
    weights: WeightBits = None,
    acts: ActBits = None,
    set_: Settings = None,
    prompts: Prompts = None,
    workspace: Annotated[
        Path | None,
        typer.Option(
            parser=named_path,
            metavar="FOLDER",
            help="folder for resuming (default: OUTPUT.work); compress with the same budget goes on there",
        ),
    ] = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    device: Device = None,
    dtype: Dtype = None,
    stream: Stream = None,
    as_json: Json = False,
) -> None:
    """Choose the bits of each layer under a budget, by measured sensitivity; the plan can be edited."""
    from attar import conductor, ranks
    from attar.allocation import PLAN
    from attar.budget.plan_file import write_plan
    from attar.models.memory import choose, open_pipeline
    from attar.models.source import find_source, read_prompts
    from attar.progress import RichProgress, SilentProgress
    from attar.recipe import load_recipe
    from attar.workspace import Workspace

    short = {"quantize.weights": weights, "quantize.acts": acts, "allocate.budget": budget}
    chosen = load_recipe(recipe, {**assignments(set_), **without_none(short)})
    precision = torch_dtype(dtype)
    given = None if prompts is None else read_prompts(prompts)
    if output.is_dir():
        raise AttarError("the output is a folder", where=str(output), fix="Name a file, such as plan.yaml")
    check_writable(output.parent)
    source = find_source(model, alone=chosen.synthesize is not None)
    choice = ranks.first(
        lambda: choose(
            source, True, precision, device, stream,
            processes=ranks.here(), decodes=chosen.synthesize is not None,
        )
    )  # fmt: skip
    note(f"weights {'streamed' if choice.streamed else 'in memory'}: {choice.reason}")
    work = Workspace(workspace or Path(f"{output}.work"))
    pipe = open_pipeline(source, choice, precision, device)
    size = without_none({"height": height, "width": width, "num_frames": frames})
    progress = RichProgress() if ranks.is_first() else SilentProgress()
    allocation = conductor.choose_plan(pipe, source, chosen, work, given, size, seed, progress)
    if not ranks.is_first():
        return
    text = (work.folder / PLAN).read_text(encoding="utf-8")
    write_plan(output, text)
    if as_json:
        emit({"output": str(output), "workspace": str(work.folder), **vars(allocation)})
    else:
        print(text, end="")
        note(f"{output}: {allocation.summary()}")
