"""Videos from a pipeline, each from its own seeded noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attar.errors import AttarError, calling
from attar.models.calls import conditioning, following
from attar.models.offload import computes_on
from attar.runtime.clock import now


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
    Of a class-conditional pipeline a prompt names a class. Raises AttarError when the pipeline rejects its arguments,
    does not know a class, or gives something that is not finite.
    """
    videos, seconds, done = [], [], 0
    options = dict(call or {})
    conditions = [conditioning(pipe, prompt) for prompt in prompts]
    device = computes_on(pipe)

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if step is not None:
            step(done)

    for i, condition in enumerate(conditions):
        started = now(device)
        generator = torch.Generator().manual_seed(seed + i)
        with (
            nullcontext({}) if step is None else following(pipe, count) as followed,
            torch.no_grad(),
            calling(pipe),
        ):
            result = pipe(**condition, generator=generator, output_type="pt", **followed, **options)
        seconds.append(now(device) - started)
        frames = result.frames if hasattr(result, "frames") else result.images[:, None]
        if not bool(torch.isfinite(frames).all()):
            raise AttarError("the generated video is not finite", where=prompts[i])
        videos.append(frames.float().cpu())
    return Generated(torch.cat(videos), seconds)
