"""Runs a full-precision pipeline on calibration prompts and stores every denoising step as a candidate."""

from __future__ import annotations

import functools
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
    rejects its arguments, or if a finished prompt was traced with other settings.
    """
    _check_traceable(pipe)
    options = dict(generation or {})
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    done = set(store.prompts_done())
    for index, prompt in enumerate(prompts):
        settings = _plain({"prompt": prompt, "seed": seed + index, "steps": steps, **options})
        if index in done:
            _check_same(store, index, settings)
            continue
        if index % ranks.size() != ranks.rank():
            continue  # another process generates it
        record = PromptRecord(settings)
        final = _generate(pipe, prompt, record, steps, seed + index, options, index, progress)
        record.end(final)
        store.save_prompt(index, record)
    ranks.barrier()


def _generate(
    pipe: Any,
    prompt: str,
    record: PromptRecord,
    steps: int,
    seed: int,
    options: Mapping[str, Any],
    index: int,
    progress: Progress | None,
) -> Tensor:
    def on_step_end(_: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_step(step, timestep, tensors["latents"])
        return {}

    def on_step(step: int, timestep: Any, latents: Tensor) -> None:
        record.end_step(float(timestep), latents)
        if progress is not None:
            progress(index, step + 1, steps)

    callback: dict[str, Any] = {"callback": on_step, "callback_steps": 1}
    if "callback_on_step_end" in _call_parameters(pipe):
        callback = {"callback_on_step_end": on_step_end, "callback_on_step_end_tensor_inputs": ["latents"]}
    with _recording(pipe, record), _quiet(pipe), torch.no_grad(), calling(pipe):
        result = pipe(
            prompt=prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            return_dict=False,
            **callback,
            **options,
        )
    if not isinstance(result[0], Tensor):
        raise AttarError('the pipeline returns no tensor for output_type="latent"', where=type(pipe).__name__)
    return result[0]


@contextmanager
def _recording(pipe: Any, record: PromptRecord) -> Iterator[None]:
    """Inside, the record receives every transformer call, and the noise that enters the first step."""

    def watch(component: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            record.add_call(component, bind(module, args, kwargs))

        return hook

    step = pipe.scheduler.step
    signature = inspect.signature(step)

    @functools.wraps(step)
    def watched_step(*args: Any, **kwargs: Any) -> Any:
        # pipelines draw the noise inside; here it shows, in its own precision
        if not record.latents:
            record.add_latents(signature.bind(*args, **kwargs).arguments["sample"])
        return step(*args, **kwargs)

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in transformer_components(pipe).items()
    ]
    own = vars(pipe.scheduler).get("step")  # set on the object itself, by others
    pipe.scheduler.step = watched_step
    try:
        yield
    finally:
        del pipe.scheduler.step
        if own is not None:
            pipe.scheduler.step = own
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
    parameters = _call_parameters(pipe)
    if "callback_on_step_end" in parameters:
        if "latents" not in getattr(pipe, "_callback_tensor_inputs", ()):
            raise AttarError("the pipeline does not show its latents to callbacks", where=where)
    elif not {"callback", "callback_steps"} <= parameters:  # the older form, as in PixArt
        raise AttarError(
            "the pipeline has no callback_on_step_end, so its steps cannot be followed", where=where
        )
    if "sample" not in inspect.signature(pipe.scheduler.step).parameters:
        raise AttarError("the scheduler's step takes no sample", where=type(pipe.scheduler).__name__)


def _call_parameters(pipe: Any) -> set[str]:
    return set(inspect.signature(pipe.__call__).parameters)


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
