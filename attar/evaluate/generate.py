"""Videos from a pipeline, each from its own seeded noise."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attar.errors import AttarError, calling


@dataclass
class Generated:
    """videos (B, F, C, H, W) in [0, 1] on the CPU, float32; seconds of wall time for each."""

    videos: Tensor
    seconds: list[float]


def generate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    step: Callable[[int], None] | None = None,
) -> Generated:
    """One video for each prompt; prompt i starts from noise of a CPU generator seeded with seed + i.

    So two models that are given the same prompts and seed start from the same noise. call: further arguments of the
    pipeline. step: called with the number of denoising steps done in all. Images come out as videos of one frame.
    Raises AttarError when the pipeline rejects its arguments or gives something that is not finite.
    """
    videos, seconds, done = [], [], 0
    options = dict(call or {})
    parameters = inspect.signature(pipe.__call__).parameters

    def count() -> None:
        nonlocal done
        done += 1
        if step is not None:
            step(done)

    def on_step_end(_: Any, k: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        count()
        return {}

    if step is not None and "callback_on_step_end" in parameters:
        options["callback_on_step_end"] = on_step_end
    elif step is not None and "callback" in parameters:  # the older form, as in PixArt
        options |= {"callback": lambda k, t, latents: count(), "callback_steps": 1}
    for i, prompt in enumerate(prompts):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed + i)
        with torch.no_grad(), calling(pipe):
            result = pipe(prompt=prompt, generator=generator, output_type="pt", **options)
        seconds.append(time.perf_counter() - started)
        frames = result.frames if hasattr(result, "frames") else result.images[:, None]
        if not bool(torch.isfinite(frames).all()):
            raise AttarError("the generated video is not finite", where=prompt)
        videos.append(frames.float().cpu())
    return Generated(torch.cat(videos), seconds)
