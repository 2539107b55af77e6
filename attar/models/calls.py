"""How a diffusers pipeline is called and followed for one prompt: a sentence, or the name of a class.

Class-conditional pipelines (`DiTPipeline`) take numbers of classes instead of a prompt, call nobody back after a step,
and always decode. What that needs is here, so that tracing and generation need not know it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from attar.errors import AttarError


def call_parameters(pipe: Any) -> set[str]:
    """Names of the arguments that the pipeline, or a class of pipelines, is called with."""
    return set(inspect.signature(pipe.__call__).parameters)


def call_value(pipe: Any, call: Mapping[str, Any], name: str, other: Any) -> Any:
    """What a call of the pipeline with these arguments has under a name: given, else the pipeline's default, else
    `other`."""
    given = call.get(name)
    if given is None and name in (parameters := inspect.signature(pipe.__call__).parameters):
        given = parameters[name].default
    return other if given is None or given is inspect.Parameter.empty else given


def steps_of(pipe: Any, call: Mapping[str, Any]) -> int:
    """How many denoising steps a call of the pipeline with these arguments takes."""
    return int(call_value(pipe, call, "num_inference_steps", 50))


def makes_videos(pipe: Any) -> bool:
    """Whether the pipeline, or a class of pipelines, is asked for a number of frames; else it makes images."""
    return bool({"num_frames", "video_length"} & call_parameters(pipe))


def by_class(pipe: Any) -> bool:
    """Whether the pipeline is conditioned on classes alone."""
    parameters = call_parameters(pipe)
    return "class_labels" in parameters and "prompt" not in parameters


def conditioning(pipe: Any, prompt: str) -> dict[str, Any]:
    """The argument of the pipeline's call that says what to make.

    For a class-conditional pipeline a prompt is the name of a class, or its number.
    Raises AttarError for a class that the model does not know.
    """
    return {"class_labels": [_class_number(pipe, prompt)]} if by_class(pipe) else {"prompt": prompt}


def class_names(id2label: Mapping[Any, str]) -> list[str]:
    """One name for each class, in an order whose every beginning is spread evenly over the classes."""
    names = {int(number): str(label).split(",")[0].strip() for number, label in id2label.items()}
    return [names[number] for number in sorted(names, key=lambda number: number * 0.6180339887498949 % 1)]


def known_classes(pipe: Any) -> list[str]:
    """The same for a pipeline; none where it is not class-conditional, or has no labels."""
    labels: dict[str, int] = getattr(pipe, "labels", None) or {}
    first = {number: name for name, number in sorted(labels.items(), reverse=True)}
    return class_names(first) if labels and by_class(pipe) else []


def _class_number(pipe: Any, prompt: str) -> int:
    labels: dict[str, int] = getattr(pipe, "labels", None) or {}
    text = prompt.strip()
    if text in labels:
        return labels[text]
    numbers = set(labels.values()) or set(range(int(pipe.transformer.config.num_embeds_ada_norm)))
    if text.isdecimal() and int(text) in numbers:
        return int(text)
    some = [*known_classes(pipe)[:3], f"a number from {min(numbers)} to {max(numbers)}"]
    raise AttarError(
        "the model knows no such class",
        where=repr(prompt),
        fix=f"Give a class, for example: {', '.join(some)}",
    )


@contextmanager
def following(
    pipe: Any,
    on_step: Callable[[int, Any, Tensor], None],
    on_noise: Callable[[Tensor], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Inside, a call for one prompt that is given the yielded arguments too is followed.

    on_step: called with step, timestep and latents after each denoising step. on_noise: called with the noise that
    enters the first one; pipelines draw it inside, but the scheduler is given it in its own precision. A pipeline that
    calls nobody back with its latents, and is not class-conditional, is not followed.
    """
    parameters = call_parameters(pipe)
    watched = by_class(pipe)
    options: dict[str, Any] = {}

    def on_step_end(_: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_step(step, timestep, tensors["latents"])
        return {}

    if "latents" in getattr(pipe, "_callback_tensor_inputs", ()) and "callback_on_step_end" in parameters:
        options = {"callback_on_step_end": on_step_end, "callback_on_step_end_tensor_inputs": ["latents"]}
    elif {"callback", "callback_steps"} <= parameters:  # the older form, as in PixArt
        options = {"callback": on_step, "callback_steps": 1}
    count = 0

    def before(sample: Tensor) -> None:
        if count == 0 and on_noise is not None:
            on_noise(sample[:1] if watched else sample)  # both branches of guidance hold the same latents

    def after(timestep: Any, result: Any) -> None:
        nonlocal count
        count += 1
        if watched:
            on_step(count - 1, timestep, (result[0] if isinstance(result, tuple) else result.prev_sample)[:1])

    if not watched and on_noise is None:
        yield options
        return
    with _watched_steps(pipe.scheduler, before, after):
        yield options


@contextmanager
def latents_only(pipe: Any) -> Iterator[dict[str, Any]]:
    """Inside, a call that is given the yielded arguments too is not decoded.

    Its first output is the latents then; of a class-conditional pipeline it is nothing of use, see `following`.
    """
    if not by_class(pipe):
        yield {"output_type": "latent"}
        return
    pipe.vae.decode = lambda latents, *_, **__: SimpleNamespace(sample=latents)
    try:
        yield {"output_type": "pt"}
    finally:
        del pipe.vae.decode


@contextmanager
def _watched_steps(
    scheduler: Any, before: Callable[[Tensor], None], after: Callable[[Any, Any], None]
) -> Iterator[None]:
    """Inside, `before` sees the sample that enters each step of the scheduler, `after` its timestep and result."""
    step = scheduler.step
    signature = inspect.signature(step)

    @functools.wraps(step)
    def watched_step(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        before(arguments["sample"])
        result = step(*args, **kwargs)
        after(arguments["timestep"], result)
        return result

    own = vars(scheduler).get("step")  # set on the object itself, by others
    scheduler.step = watched_step
    try:
        yield
    finally:
        del scheduler.step
        if own is not None:
            scheduler.step = own
