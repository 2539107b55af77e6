"""From what a user types to a pipeline: a built-in name, a local diffusers folder, or a hub id."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from attar.errors import AttarError, reason
from attar.files import named_path
from attar.models.alone import Alone, autoencoder_class
from attar.models.calls import class_names
from attar.models.components import check_complete, load_complete
from attar.models.offload import check_offload, keep_in_main_memory
from attar.models.zoo import zoo_folder, zoo_names
from attar.runtime.aligned import align
from attar.runtime.checkpoint import QUANT_METHOD
from attar.runtime.integrity import verify_folder

GENERATION_KEYS: dict[str, type] = {
    "height": int, "width": int, "num_frames": int, "num_inference_steps": int, "max_sequence_length": int,
    "guidance_scale": float, "fps": float, "negative_prompt": str,
}  # fmt: skip


@dataclass
class Source:
    """Where a model comes from, and how it wants to be called.

    folder: local folder of the pipeline, None when it was given as an object. generation: the folder's own defaults
    (generation.json), which go to the pipeline's call; "fps" among them is for the video file.
    """

    name: str
    folder: Path | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)  # calibration prompts that come with the model
    classes: list[str] = field(
        default_factory=list
    )  # names of a class-conditional model's classes, well mixed
    alone: bool = False  # the folder is an autoencoder's own, with no pipeline around it

    @property
    def pipeline_class(self) -> type | None:
        """The class that diffusers has for the folder's pipeline; None where the code is someone else's."""
        import diffusers

        name = None if self.folder is None or self.alone else _index(self.folder).get("_class_name")
        return getattr(diffusers, name, None) if isinstance(name, str) else None

    def place(self, root: Path, component: str) -> Path:
        """Where a component lies below a folder of such a model."""
        return root if self.alone else root / component

    @property
    def fps(self) -> float:
        return float(self.generation.get("fps", 16))

    def call_arguments(self, **overrides: Any) -> dict[str, Any]:
        """Arguments of the pipeline's call without the prompt: the model's defaults under the given ones."""
        given = {k: v for k, v in overrides.items() if v is not None}
        return {k: v for k, v in {**self.generation, **given}.items() if k != "fps"}


def find_source(model: str, *, alone: bool = False) -> Source:
    """Resolves a name without loading weights; a hub id is downloaded (HF_HOME and HF_HUB_OFFLINE are honoured).

    alone: an autoencoder without a pipeline will do. Raises AttarError when nothing is found, or the folder holds no
    pipeline.
    """
    if model in zoo_names():
        return _folder_source(model, zoo_folder(model))
    path = named_path(model)
    if path.is_dir():
        return _folder_source(model, path, alone)
    if path.is_file():
        raise AttarError("a model is a diffusers folder, not a file", where=model)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        names = ", ".join(zoo_names())
        fix = f"Give a diffusers folder, a hub id, or one of: {names} (shapes of real models are for plan and bench)"
        raise AttarError("no such model", where=model, fix=fix)
    from huggingface_hub import snapshot_download

    try:
        return _folder_source(model, Path(snapshot_download(model)), alone)
    except AttarError:
        raise
    except Exception as error:  # network, authentication, unknown repository: all the hub's own words
        raise AttarError(f"the hub gives no such model ({reason(error)})", where=model) from error


def load(
    model: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    offload: str | None = None,
) -> Any:
    """A pipeline, or an autoencoder in a folder of its own, by built-in name, folder or hub id, compressed or not, on a
    device. See `load_pipeline`."""
    source = find_source(str(model), alone=True)
    pipe = load_pipeline(source, dtype=dtype, device=device, offload=offload)
    return pipe.vae if source.alone else pipe


def load_pipeline(
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    offload: str | None = None,
    quiet: bool = True,
) -> Any:
    """The pipeline of a source on a device, or what stands for it (`Alone`). dtype defaults to float32 on CPU and
    bfloat16 elsewhere. offload: what waits in main memory until it runs on the device, see offload.py.

    Raises AttarError for folders that diffusers cannot read, for weight files that are damaged or lack a tensor, and
    for offloading from the CPU, or of an autoencoder alone.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if offload is not None:
        check_offload(offload, device, source.alone)
    dtype = dtype or default_dtype(device)
    assert source.folder is not None
    check_weight_files(source.folder)
    if is_compressed(source.folder):
        verify_folder(source.folder)
    if source.alone:
        with loading(source, quiet):
            return Alone(load_part(autoencoder_class(source.folder), source.folder, dtype, device))
    with loading(source, quiet):
        pipe = DiffusionPipeline.from_pretrained(source.folder, torch_dtype=dtype)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and (source.folder / name).is_dir():
                check_complete(part, source.folder / name)
    labels = _index(source.folder).get("id2label")
    if labels is not None:  # diffusers reads them, and would not write them again
        pipe.register_to_config(id2label=labels)
    pipe.set_progress_bar_config(disable=True)
    if offload is not None:
        keep_in_main_memory(pipe, device, offload)
        return pipe
    pipe.to(device)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            align(part)
    return pipe


def load_part(cls: Any, folder: Path, dtype: torch.dtype, device: str) -> Any:
    """A component alone, as it is in a pipeline that was loaded whole. AttarError where its files lack a tensor."""
    model = load_complete(cls, folder, torch_dtype=dtype).to(device)
    align(model)
    return model


def default_dtype(device: str) -> torch.dtype:
    """The type that a pipeline is loaded in where none is named."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


@contextmanager
def loading(source: Source, quiet: bool = True) -> Iterator[None]:
    """What diffusers and transformers raise inside about a folder becomes one AttarError; they print nothing."""
    try:
        with _quiet() if quiet else nullcontext():
            yield
    except AttarError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        raise AttarError(f"the pipeline cannot be loaded ({reason(error)})", where=source.name) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers and transformers neither advise nor show bars inside."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    verbosity = ours.get_verbosity(), theirs.get_verbosity()
    shown = [logging for logging in (ours, theirs) if logging.is_progress_bar_enabled()]
    try:
        for logging in (ours, theirs):
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch_dtype, which older versions need
            yield
    finally:
        ours.set_verbosity(verbosity[0])
        theirs.set_verbosity(verbosity[1])
        for logging in shown:
            logging.enable_progress_bar()


def check_device(name: str) -> None:
    """Raises AttarError for a device that is not here."""
    try:
        known = torch.device(name).type != "meta" and torch.empty(1, device=name).numel() == 1
    except (RuntimeError, AssertionError, NotImplementedError):
        known = False
    if not known:
        raise AttarError("no such device here", where=name, fix="Use cpu, or cuda where there is a GPU")


def check_weight_files(folder: Path) -> None:
    """Every safetensors file of the folder opens. Raises AttarError for a truncated or malformed one."""
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                file.metadata()
        except PermissionError as error:
            where, fix = str(path.relative_to(folder)), "Change its permissions"
            raise AttarError("the weight file may not be read", where=where, fix=fix) from error
        except (SafetensorError, OSError) as error:
            raise AttarError(
                f"the weight file is damaged or incomplete ({error})",
                where=str(path.relative_to(folder)),
                fix="Copy or download it again",
            ) from error


def is_compressed(folder: Path) -> bool:
    """Whether a component of the pipeline folder, or the autoencoder that the folder holds, is an attar checkpoint."""
    try:
        named = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        named = None
    if not isinstance(named, dict):  # no pipeline's
        named = {".": None}
    configs = (folder / name / "config.json" for name in named if not name.startswith("_"))
    return any(f'"{QUANT_METHOD}"' in path.read_text(errors="replace") for path in configs if path.is_file())


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The floating-point type of every tensor in a component's safetensors files, by name."""
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    found: dict[str, torch.dtype] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                dtype = known.get(file.get_slice(key).get_dtype())
                if dtype is not None:
                    found[key] = dtype
    return found


def read_prompts(path: str | Path, what: Callable[[str], bool] = bool) -> list[str]:
    """Prompts of a text file, one a line; empty lines are left out. Raises AttarError if none is left, or no text."""
    path = Path(path)
    if not path.is_file():
        raise AttarError("no such prompts file", where=str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark in front
    except UnicodeDecodeError as error:
        raise AttarError(
            "the prompts file is not UTF-8 text", where=str(path), fix="Write one prompt a line"
        ) from error
    prompts = [line.strip() for line in text.splitlines() if what(line.strip())]
    if not prompts:
        raise AttarError("the prompts file is empty", where=str(path), fix="Write one prompt a line")
    if any("\x00" in prompt for prompt in prompts):
        raise AttarError("the prompts file is not text", where=str(path), fix="Write one prompt a line")
    return prompts


def _folder_source(name: str, folder: Path, alone: bool = False) -> Source:
    if not (folder / "model_index.json").is_file():
        own = autoencoder_class(folder)
        if own is not None and alone:
            return Source(name, folder, alone=True)
        if own is not None:
            raise AttarError(
                f"the folder holds an autoencoder alone ({own.__name__}), and no pipeline",
                where=name,
                fix="Compress it with a recipe for autoencoders, such as zeroq, or give a pipeline's folder",
            )
        raise AttarError(
            "the folder holds no diffusers pipeline (model_index.json is missing)",
            where=name,
            fix="Give the folder that has model_index.json in it",
        )
    prompts = folder / "calibration_prompts.txt"
    labels = _index(folder).get("id2label")
    if not isinstance(labels, dict) or not all(str(number).isdecimal() for number in labels):
        labels = {}
    return Source(
        name, folder, _generation(folder), read_prompts(prompts) if prompts.is_file() else [],
        class_names(labels),
    )  # fmt: skip


def _index(folder: Path) -> dict[str, Any]:
    """model_index.json. Raises AttarError where it is no mapping."""
    path = folder / "model_index.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise AttarError("model_index.json is not valid JSON, or no mapping", where=str(path))
    return content


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AttarError("generation.json is not valid JSON", where=str(path)) from error
    if not isinstance(content, dict):
        raise AttarError("generation.json is no mapping", where=str(path))
    for key, value in content.items():
        kind = GENERATION_KEYS.get(key)
        if kind is None:
            known = ", ".join(sorted(GENERATION_KEYS))
            raise AttarError(f"unknown key {key!r}", where=str(path), fix=f"Known: {known}")
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not fits or (kind is not str and not value >= (0 if key == "guidance_scale" else 1)):
            raise AttarError(f"{key} cannot be {value!r}", where=str(path), fix="Correct this entry")
    return content
