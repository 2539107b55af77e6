"""Runs a full-precision pipeline on calibration prompts and stores every denoising step as a candidate."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.calibration.store import PromptRecord, TraceStore
from attar.errors import AttarError, calling
from attar.models.block import bind
from attar.models.calls import by_class, call_parameters, conditioning, following, latents_only
from attar.models.components import is_denoiser

Progress = Callable[[int, int, int], None]


def transformer_components(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's denoising transformers by component name: `transformer`, and `transformer_2` in
    two-stage models (Wan 2.2), or a U-Net, `unet`. Raises AttarError if there is none."""
    found = {
        name: module
        for name, module in pipe.components.items()
        if is_denoiser(name) and isinstance(module, nn.Module)
    }
    if not found:
        raise AttarError("the pipeline has no transformer or unet component", where=type(pipe).__name__)
    return found


def trace_pipeline(
    pipe: Any,
    prompts: Sequence[str],
    store: TraceStore,
    *,
    steps: int,
    guidance_scale: float | None = None,
    seed: int = 0,
    generation: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Generates every prompt that the store lacks, and saves each one's trajectory and transformer calls.

    For every step the store then holds the latents before and after, the timestep, and the keyword arguments
    of each transformer call with the name of the component called. The final decoding is skipped. Prompt p
    draws its noise from a CPU generator seeded with seed + p, so neither order nor interruption changes a
    trace. Several processes take the prompts in turns, and all return when all are done.

    generation: further arguments of the pipeline (height, width, num_frames, negative_prompt, ...),
    JSON-able.
    progress: called as progress(prompt index, steps done, steps) after every step.
    Raises AttarError if the pipeline cannot be traced (no step callback that shows the latents), if it
    rejects its arguments or does not know a class, or if a finished prompt was traced with other settings.
    """
    _check_traceable(pipe)
    options = dict(generation or {})
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    conditions = [conditioning(pipe, prompt) for prompt in prompts]
    done = set(store.prompts_done())
    for index, prompt in enumerate(prompts):
        settings = _plain({"prompt": prompt, "seed": seed + index, "steps": steps, **options})
        if index in done:
            _check_same(store, index, settings)
            continue
        if index % ranks.size() != ranks.rank():
            continue  # another process generates it
        record = PromptRecord(settings)
        final = _generate(pipe, conditions[index], record, steps, seed + index, options, index, progress)
        record.end(final)
        store.save_prompt(index, record)
    ranks.barrier()


def _generate(
    pipe: Any,
    condition: Mapping[str, Any],
    record: PromptRecord,
    steps: int,
    seed: int,
    options: Mapping[str, Any],
    index: int,
    progress: Progress | None,
) -> Tensor:
    latents: list[Tensor] = []  # the last ones

    def on_step(step: int, timestep: Any, made: Tensor) -> None:
        record.end_step(float(timestep), made)
        latents[:] = [made]
        if progress is not None:
            progress(index, step + 1, steps)

    with (
        _recording(pipe, record),
        following(pipe, on_step, record.add_latents) as followed,
        latents_only(pipe) as undecoded,
        _quiet(pipe),
        torch.no_grad(),
        calling(pipe),
    ):
        result = pipe(
            **condition,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            return_dict=False,
            **undecoded,
            **followed,
            **options,
        )
    final = latents[-1] if by_class(pipe) else result[0]
    if not isinstance(final, Tensor):
        raise AttarError('the pipeline returns no tensor for output_type="latent"', where=type(pipe).__name__)
    return final


@contextmanager
def _recording(pipe: Any, record: PromptRecord) -> Iterator[None]:
    """Inside, the record receives every transformer call."""

    def watch(component: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            record.add_call(component, bind(module, args, kwargs))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in transformer_components(pipe).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """The pipeline shows no progress bar of its own inside."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


def _check_traceable(pipe: Any) -> None:
    where = type(pipe).__name__
    transformer_components(pipe)
    parameters = call_parameters(pipe)
    if "callback_on_step_end" in parameters:
        if "latents" not in getattr(pipe, "_callback_tensor_inputs", ()):
            raise AttarError("the pipeline does not show its latents to callbacks", where=where)
    elif not ({"callback", "callback_steps"} <= parameters or by_class(pipe)):
        raise AttarError(
            "the pipeline has no callback_on_step_end, so its steps cannot be followed", where=where
        )
    if "sample" not in inspect.signature(pipe.scheduler.step).parameters:
        raise AttarError("the scheduler's step takes no sample", where=type(pipe.scheduler).__name__)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they come back from a file."""
    try:
        return json.loads(json.dumps(settings))
    except TypeError as error:
        raise AttarError(f"a generation argument cannot be stored as JSON: {error}") from error


def _check_same(store: TraceStore, index: int, settings: Mapping[str, Any]) -> None:
    known = store.settings(index)
    different = [k for k in {**known, **settings} if known.get(k) != settings.get(k)]
    if different:
        raise AttarError(
            f"prompt {index} was traced with other settings ({', '.join(sorted(different))})",
            where=str(store.folder),
            fix="Trace into another folder, or delete this one",
        )
