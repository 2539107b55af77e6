"""Calibration samples that are made of a decoder's own statistics, and kept in the workspace."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.calibration.synthesize import batch_sizes, keeps_statistics, statistics_error, synthesize
from attar.errors import AttarError
from attar.models.block import signature_of
from attar.models.units import decoder_of
from attar.progress import Progress
from attar.samples import Sample
from attar.stages import Synthesize
from attar.workspace import Workspace

LATENTS = "latents"


def autoencoders(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's autoencoders whose decoder keeps running statistics, by component name. AttarError for none."""
    found, others = {}, []
    for name, part in pipe.components.items():
        decoder = decoder_of(part) if isinstance(part, nn.Module) else None
        if decoder is not None and keeps_statistics(decoder):
            found[name] = part
        elif decoder is not None:
            others.append(type(part).__name__)
    if not found:
        raise AttarError(
            "no decoder of the model keeps running statistics (batch normalisation), of which the recipe makes its "
            "calibration samples",
            where=", ".join(others) or type(pipe).__name__,
            fix="Take a recipe that traces the pipeline, such as attar, to compress its denoiser",
        )
    return found


def make_samples(
    name: str, model: nn.Module, settings: Synthesize, workspace: Workspace, seed: int, progress: Progress
) -> None:
    """Latents for an autoencoder's decoder, unless they are in the workspace already. They are kept when all are made,
    with what synthesis makes small (`statistics_error`), a mean over batches.

    Of several processes the first makes them for all. Raises AttarError as `attar.synthesize` does.
    """
    if ranks.is_first() and not workspace.has(_file(name)):
        decoder, config = decoder_of(model), getattr(model, "config", {})
        assert decoder is not None
        shape = (config["latent_channels"], settings.side, settings.side)
        own = (_number(config, "shift_factor", 0.0), 1 / _number(config, "scaling_factor", 1.0))
        with progress.task(f"{name}: synthesise latents", 1) as advance:
            latents = _latents(decoder, shape, own, settings, seed, advance)
            latents = latents.to(next(decoder.parameters()).dtype)
        batches = latents.split(
            batch_sizes(len(latents), settings.batch_size)
        )  # those that they were made in
        distances = [statistics_error(decoder, b, statistics=settings.statistics) * len(b) for b in batches]
        distance = sum(distances) / len(latents)
        workspace.write_tensors(_file(name), {LATENTS: latents}, {"distance": float(f"{distance:.6g}")})
    ranks.barrier()


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A factor of the configuration, which may be null."""
    value = config.get(key)
    if value is None:
        return default
    scales = key == "scaling_factor"
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not isfinite(value)
        or (scales and value <= 0)
    ):
        what = "a number above zero" if scales else "a number"
        raise AttarError(f"{key} is {value!r}, and not {what}", where="config.json", fix="Check the model")
    return float(value)


def _latents(
    decoder: nn.Module,
    shape: tuple[int, int, int],
    own: tuple[float, float],
    settings: Synthesize,
    seed: int,
    advance: Any,
) -> Tensor:
    """(count, *shape). own: mean and deviation of the latents."""
    if settings.by == "noise":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(settings.count, *shape, generator=generator)
        return (own[0] + own[1] * noise).to(next(decoder.parameters()).device)
    return synthesize(
        decoder, shape, settings.count, by=settings.by, statistics=settings.statistics,
        input_statistics=own if settings.known else None, batch_size=settings.batch_size, steps=settings.steps,
        swing=settings.swing, seed=seed,
        progress=lambda done, total, loss: advance(done / total, f"step {done} of {total}, distance {loss:.3g}"),
    )  # fmt: skip


def read_samples(name: str, model: nn.Module, workspace: Workspace) -> tuple[list[Sample], dict[str, Any]]:
    """What `make_samples` left: each latent as one call of the decoder, and what is known of all."""
    stored = workspace.read_tensors(_file(name))
    if stored is None:
        raise AttarError("the synthesised samples are missing", where=_file(name), fix="Run again")
    decoder = decoder_of(model)
    assert decoder is not None
    argument = next(iter(signature_of(decoder).parameters))
    tensors, evidence = stored
    return [[{argument: latent[None]}] for latent in tensors[LATENTS]], evidence


def _file(name: str) -> str:
    return f"{name}/synthesised.safetensors"
