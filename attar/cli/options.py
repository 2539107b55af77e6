"""What several commands share: options, their values, and how results and remarks are printed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from attar.errors import AttarError
from attar.files import named_path

Model = Annotated[str, typer.Argument(help="a built-in name, a diffusers folder, or a hub id")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one)")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: float32 on CPU)")]
Seed = Annotated[int, typer.Option(min=0, max=2**61, help="of noise, selection, rotations and order")]
NoiseSeed = Annotated[int, typer.Option(min=0, max=2**61, help="of the noise; prompt i uses seed + i")]
Prompts = Annotated[
    Path | None, typer.Option(parser=named_path, metavar="FILE", help="text file, one prompt a line")
]
RecipeName = Annotated[str, typer.Option("--recipe", help="published name or YAML file; see `attar recipes`")]
WeightBits = Annotated[int | None, typer.Option("--weights", help="bits of weights")]
ActBits = Annotated[int | None, typer.Option("--acts", help="bits of activations")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="override, e.g. reconstruct.epochs=5")]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="read weights block by block, or load the pipeline whole (default: what fits)",
    ),
]
Height = Annotated[int | None, typer.Option(min=1, help="pixels (default: the model's)")]
Width = Annotated[int | None, typer.Option(min=1, help="pixels (default: the model's)")]
Frames = Annotated[int | None, typer.Option(min=1, help="number of frames (default: the model's)")]
Steps = Annotated[int | None, typer.Option(min=1, help="denoising steps (default: the model's)")]
Guidance = Annotated[float | None, typer.Option(min=0, help="classifier-free guidance scale")]
Offload = Annotated[
    str | None,
    typer.Option(
        metavar="model|group",
        help="keep in main memory what does not run: all but one component, or all but one layer (slower)",
    ),
]


def note(message: str) -> None:
    """A line on stderr, once for all processes."""
    from attar import ranks

    if ranks.is_first():
        print(message, file=sys.stderr)


def assignments(pairs: list[str] | None) -> dict[str, Any]:
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


def call_options(
    steps: int | None, guidance: float | None, height: int | None, width: int | None, frames: int | None
) -> dict[str, Any]:
    """Arguments of a pipeline's call by the names that diffusers has for them; None leaves one to the model."""
    return {
        "num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width,
        "num_frames": frames,
    }  # fmt: skip


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def torch_dtype(name: str | None) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise AttarError(f"unknown dtype {name!r}", where="--dtype", fix=f"Use one of {', '.join(known)}")
    return None if name is None else known[name]


def emit(content: Any) -> None:
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
