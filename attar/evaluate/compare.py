"""The paired comparison of a compressed pipeline with its original: same prompts, same noise, one report."""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.evaluate.fidelity import psnr, ssim
from attar.evaluate.generate import Generated, generate
from attar.evaluate.image import save_image
from attar.evaluate.report import build_report, check_report_folder
from attar.evaluate.report_data import (
    AttentionMass,
    BlockError,
    ChosenSample,
    Generation,
    ModelFacts,
    PlanRow,
    ReportData,
    Selection,
    TimestepError,
    VideoPair,
)
from attar.evaluate.size import model_size
from attar.evaluate.video import save_video, to_frames
from attar.models.block import bind
from attar.models.calls import call_value, steps_of
from attar.models.components import is_denoiser
from attar.models.offload import computes_on
from attar.models.source import Source, load_pipeline
from attar.models.tree import map_tensors
from attar.models.zoo.judges import DigitReader, verdicts
from attar.progress import Progress
from attar.runtime.describe import describe_backend

ERROR_POINTS = 25  # denoising steps at which both denoisers are fed the same input


def compare(
    reference: Source,
    compressed: Source,
    prompts: Sequence[str],
    out: str | Path,
    *,
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    offload: str | None = None,
    progress: Progress,
) -> ReportData:
    """Generates every prompt with both models; writes `out`/index.html, report.json, and videos/*.mp4 or images/*.png.

    One model is in memory at a time; a former report in `out` is replaced. overrides: arguments of the pipeline's
    call, of both models. Raises AttarError when the two do not belong together, and when `out` holds something else
    than a report.
    """
    out = Path(out)
    check_report_folder(out)
    call = reference.call_arguments(**(overrides or {}))
    record, other = _record(compressed), _record(reference)
    pipe = load_pipeline(reference, dtype=dtype, device=device, offload=offload)
    steps, guidance = steps_of(pipe, call), float(call_value(pipe, call, "guidance_scale", 1.0))
    with progress.task("original", len(prompts) * steps) as advance, _Recorder(pipe, steps) as recorded:
        before = generate(pipe, prompts, seed=seed, call=call, step=lambda done: advance(done))
    kind, facts = type(pipe).__name__, _facts(reference, other, pipe, before)
    del pipe
    gc.collect()  # hooks of diffusers and accelerate refer back to the modules that they are of
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    pipe = load_pipeline(compressed, dtype=dtype, device=device, offload=offload)
    if type(pipe).__name__ != kind:
        raise AttarError(f"a {kind} cannot be compared with a {type(pipe).__name__}", where=compressed.name)
    with progress.task("compressed", len(prompts) * steps) as advance:
        after = generate(pipe, prompts, seed=seed, call=call, step=lambda done: advance(done))
    if before.videos.shape != after.videos.shape:
        raise AttarError(f"the two models make {_noun(before)}s of different sizes", where=compressed.name)
    data = ReportData(
        title=f"{compressed.name.rstrip('/').split('/')[-1]} beside {reference.name.rstrip('/').split('/')[-1]}",
        reference=facts,
        compressed=_facts(compressed, record, pipe, after),
        generation=Generation(
            steps=steps, guidance_scale=guidance, seed=seed, fps=reference.fps,
            frames=before.videos.shape[1], height=before.videos.shape[3], width=before.videos.shape[4],
        ),
        pairs=_pairs(reference, prompts, before, after, out, seed),
        timestep_errors=_timestep_errors(pipe, recorded),
        notes=_notes(len(prompts), _noun(before), record, other),
        **(record["sections"] if record else {}),
    )  # fmt: skip
    build_report(data, out)
    return data


def _pairs(
    source: Source, prompts: Sequence[str], before: Generated, after: Generated, out: Path, seed: int
) -> list[VideoPair]:
    closeness = psnr(before.videos, after.videos).tolist()
    small = min(before.videos.shape[-2:]) < 11
    similarity = [None] * len(prompts) if small else ssim(before.videos, after.videos).tolist()
    judged = [_verdicts(source, prompts, videos) for videos in (before.videos, after.videos)]
    frames = [to_frames(before.videos), to_frames(after.videos)]
    pairs = []
    for i, prompt in enumerate(prompts):
        paths = []
        for name, clips in zip(("original", "compressed"), frames, strict=True):
            meta = {"prompt": prompt, "seed": seed + i, "model": name}
            paths.append(_save(clips[i], out, f"{i:03d}-{name}", source.fps, meta))
        quality = {"reference_quality": judged[0][i], "compressed_quality": judged[1][i]}
        files = str(paths[0]), str(paths[1])
        pairs.append(VideoPair(prompt, *files, closeness[i], similarity[i], **quality, seed=seed + i))
    return pairs


def _noun(made: Generated) -> str:
    return "image" if made.videos.shape[1] == 1 else "video"


def _save(clip: np.ndarray, out: Path, name: str, fps: float, meta: dict[str, Any]) -> Path:
    """A clip (F, H, W, 3) as mp4, or one frame as PNG."""
    if len(clip) == 1:
        return save_image(clip[0], out / "images" / f"{name}.png", metadata=meta)
    return save_video(clip, out / "videos" / f"{name}.mp4", fps, max(1, 192 // clip.shape[2]), meta)


def _verdicts(source: Source, prompts: Sequence[str], videos: Tensor) -> list[dict[str, bool]]:
    """What the built-in judges see, for models and prompts that have judges; else nothing."""
    if source.folder is None or not (source.folder / "judge").is_dir():
        return [{} for _ in prompts]
    return verdicts(videos, prompts, DigitReader.load(source.folder)) or [{} for _ in prompts]


class _Recorder:
    """Keeps the first transformer call of evenly spaced steps of the first video, with the output."""

    def __init__(self, pipe: Any, steps: int) -> None:
        self.transformers = {
            name: part for name, part in pipe.components.items() if is_denoiser(name) and part is not None
        }
        wanted = max(1, min(ERROR_POINTS, steps))
        self.wanted = {round(k * (steps - 1) / max(1, wanted - 1)) for k in range(wanted)}
        self.steps = steps
        self.calls: list[tuple[int, str, dict[str, Any], Tensor]] = []
        self._step, self._last = -1, None

    def __enter__(self) -> _Recorder:
        self._handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, module in self.transformers.items()
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self.transformers = {}

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if self._step >= self.steps:
                return
            kwargs = bind(module, args, kwargs)
            timestep = kwargs.get("timestep")
            if not isinstance(timestep, Tensor):
                return
            key = float(timestep.flatten()[0])
            if key == self._last:
                return  # another guidance branch of the same step
            self._last, self._step = key, self._step + 1
            if self._step in self.wanted and self._step < self.steps:
                kept = map_tensors(kwargs, lambda tensor: tensor.detach().clone())
                first = output[0] if isinstance(output, tuple) else output.sample
                self.calls.append((self._step, name, kept, first.detach().clone()))

        return hook


@torch.no_grad()
def _timestep_errors(pipe: Any, recorded: _Recorder) -> list[TimestepError]:
    """Relative squared error of the compressed denoiser on the original's trajectory."""
    errors = []
    for step, name, kwargs, expected in recorded.calls:
        output = getattr(pipe, name)(**kwargs)
        got = output[0] if isinstance(output, tuple) else output.sample
        error = (got.float() - expected.float()).square().sum() / expected.float().square().sum().clamp_min(
            1e-12
        )
        errors.append(TimestepError(step, float(kwargs["timestep"].flatten()[0]), error.item()))
    return errors


def _facts(source: Source, record: dict[str, Any] | None, pipe: Any, made: Generated) -> ModelFacts:
    seconds = sorted(made.seconds)[len(made.seconds) // 2]
    assert source.folder is not None
    return ModelFacts(
        name=source.name.rstrip("/").split("/")[-1], parts=model_size(source.folder),
        bits=record["bits"] if record else _precision(pipe), recipe=record["recipe"]["name"] if record else None,
        backend=describe_backend(pipe.components.values(), computes_on(pipe)) if record else None,
        seconds_per_video=seconds, hardware=_hardware(),
    )  # fmt: skip


def _precision(pipe: Any) -> str:
    """The type that the denoiser works in, be it a transformer or a U-Net: a few of its parameters may have another."""
    denoiser: Any = next(
        part for name, part in pipe.components.items() if part is not None and is_denoiser(name)
    )
    return str(denoiser.dtype).removeprefix("torch.")


def _record(source: Source) -> dict[str, Any] | None:
    path = None if source.folder is None else source.folder / "compression.json"
    if path is None or not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        bits = record["recipe"]["quantize"]
        # older versions do not say it
        record["bits"] = str(record.get("bits", f"W{bits['weights']}A{bits['acts']}"))
        record["sections"] = _sections(record)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AttarError("compression.json is damaged", where=str(path), fix="Compress again") from error
    return record


def _sections(record: dict[str, Any]) -> dict[str, Any]:
    """What a compression recorded about itself, as sections of the report."""
    found: dict[str, Any] = {"block_errors": [], "attention": [], "plan": []}
    many = len(record["components"]) > 1
    for name, part in record["components"].items():
        prefix = f"{name}: " if many else ""
        for block in part["blocks"]:
            if block["error_before"] is not None:
                found["block_errors"].append(
                    BlockError(prefix + block["block"], block["error_before"], block["error_after"])
                )
            if block["attention"]:
                weights = {int(float(k)): v for k, v in block["attention"]["weights"].items()}
                found["attention"].append(
                    AttentionMass(prefix + block["block"], block["attention"]["curve"], weights)
                )
        found["plan"] += [PlanRow(**row) for row in part.get("plan", [])]
        if "selection" in part and "selection" not in found:
            found["selection"] = _selection(part["selection"], record["prompts"])
    return found


def _selection(part: dict[str, Any], prompts: list[str]) -> Selection:
    table = part["table"]
    steps = max(table["step"]) + 1
    scores = [[0.0] * steps for _ in prompts]
    for p, k, value in zip(table["prompt"], table["step"], table["score"], strict=True):
        scores[p][k] = value
    chosen = [ChosenSample(table["prompt"][i], table["step"][i], table["score"][i]) for i in part["chosen"]]
    return Selection(part["policy"], prompts, scores, chosen, table.get("norm_correlation"))


def _notes(count: int, noun: str, record: dict[str, Any] | None, other: dict[str, Any] | None) -> list[str]:
    """record, other: of the compressed model, and of the one that it is compared with, where that is compressed too."""
    notes = [
        "Sizes are those of the weight files, whatever type the model runs in.",
        f"All {noun}s of the original are timed first, then all of the compressed model: what else the machine did "
        "shows in their times. Of transformers attar bench times both in turns.",
    ]
    if other:
        notes.insert(0, f"The original beside it is compressed too, by the recipe {other['recipe']['name']}.")
    changed = record.get("changed_settings") if record else None
    if record and changed:
        told = ", ".join(
            f"{key} {value} instead of {published}" for key, (value, published) in changed.items()
        )
        notes.append(f"The recipe {record['recipe']['name']} ran with {told}.")
    if count < 30:
        notes.append(f"Figures over {count} {noun}s are indicative only; intervals are 95 %.")
    return notes


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
