"""Scores of the candidate pool: how much a denoising step changes the latent, and how much a sample amplifies error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.calibration.catch import catch_block_calls
from attar.calibration.select import (
    ScoreTable,
    amplification_metric,
    change_metric,
    patchify,
    rank_correlation,
)
from attar.calibration.store import TraceStore
from attar.errors import AttarError
from attar.models.adapter import ModelAdapter, evaluating
from attar.models.block import as_outputs
from attar.models.families import latent_layout, latents_argument
from attar.models.tree import map_tensors, tokens_of
from attar.models.weights import weights_of

# channels: the Frobenius norm needs the d×d Gram matrix, which costs more than the rest above
_BOTH_NORMS = 1024
FEATURES = ("latent", "block0_input", "last_hidden", "model_output")


def score_candidates(
    store: TraceStore,
    prompts: list[int],
    component: str,
    adapter: ModelAdapter,
    *,
    features: str = "latent",
    norm: str = "spectral",
    neighbour: str = "next",
    normalise: str = "min_max",
    progress: Callable[[int, int], None] | None = None,
) -> ScoreTable:
    """The score table of every (prompt, step) at which `component` ran (S²Q-VDiT, SDS).

    C_diff compares the latents that enter the step with those that leave it (neighbour "next"), or with those that
    entered the one before ("previous"; the first step has none and changes nothing: 0). C_quant is taken on
    `features`: the latent as tokens (n, C·p²); the input of the first block; the output of the last one; or the
    model's output as tokens. One sample is held at a time. Of a guidance pair the first branch is scored. normalise:
    of both, see `ScoreTable.build`.
    Several processes share the candidates.
    For tokens of at most 1024 channels C_quant is computed in both norms, and the table has their rank correlation.
    Raises AttarError if the component never ran in these traces, or a candidate is not finite.
    """
    where: list[tuple[int, int]] = [(p, k) for p in prompts for k in store.steps_of(component, p)]
    if not where:
        raise AttarError("the component did not run in any traced step", where=component)
    scores: list[tuple[Tensor, Tensor, Tensor]] = []
    own = ranks.mine(where)
    trajectory: tuple[int, Tensor] | None = None
    for done, (prompt, step) in enumerate(own):
        if trajectory is None or trajectory[0] != prompt:
            trajectory = (prompt, store.latents(prompt)[0])
        x = trajectory[1]
        compared = step + 1 if neighbour == "next" else max(0, step - 1)
        change = change_metric(x[step][:1], x[compared][:1])[0]
        call = store.calls(component, prompt, step)[0]
        tokens = _tokens(adapter, call, features)
        # the decomposition does not end on NaN; the table says where it came up
        finite = bool(torch.isfinite(tokens).all())
        amplification = other = torch.tensor(torch.nan)
        if finite:
            amplification = amplification_metric(tokens, norm)[0].cpu()
        if finite and tokens.shape[1] <= _BOTH_NORMS:
            other = amplification_metric(tokens, "frobenius" if norm == "spectral" else "spectral")[0].cpu()
        scores.append((change, amplification, other))
        if progress is not None:
            progress(done + 1, len(own))
    rows = [p for p, _ in where], [k for _, k in where]
    change, amplification, other = map(torch.stack, zip(*ranks.collected(scores), strict=True))
    table = ScoreTable.build(*rows, change, amplification, normalise)
    if bool(torch.isfinite(other).all()):
        table.norm_correlation = rank_correlation(amplification, other)
    return table


def _tokens(adapter: ModelAdapter, call: Mapping[str, Any], features: str) -> Tensor:
    """One candidate's x_t as a matrix (n, d) in float32."""
    if features == "latent":
        return as_tokens(adapter.transformer, call[latents_argument(adapter.transformer)][:1])[0]
    if features == "block0_input":
        caught = catch_block_calls(adapter.transformer, adapter, 0, [call])[0]
        return tokens_of(caught.streams[adapter.main_stream(adapter.blocks[0])][:1])[0].float()
    kept: list[Tensor] = []

    adapter.observe(call)
    last = adapter.blocks[-1]
    stream = last.outputs.index(adapter.main_stream(last))

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        kept.append(as_outputs(output)[stream])

    device = weights_of(adapter.transformer).device
    handle = last.module.register_forward_hook(keep)
    try:
        with evaluating(adapter.transformer):
            output = adapter.transformer(**map_tensors(dict(call), lambda t: t.to(device)))
    finally:
        handle.remove()
    if features == "last_hidden":
        return tokens_of(kept[0][:1])[0].float()
    return as_tokens(adapter.transformer, (output[0] if isinstance(output, tuple) else output.sample)[:1])[0]


def as_tokens(transformer: nn.Module, latents: Tensor) -> Tensor:
    """Latents cut into the transformer's patches, (B, n, C·p²) float32; latents that are tokens already stay so.

    Raises AttarError for latents of another number of axes, or of a size that is no multiple of the patch.
    """
    if latents.ndim == 3:
        return latents.float()
    if latents.ndim not in (4, 5):
        raise AttarError(f"latents of shape {tuple(latents.shape)} are neither image, video nor tokens")
    config: Any = transformer.config
    patch = config.get("patch_size") or 1
    if not isinstance(patch, int):
        patch = tuple(patch)
        patch = patch if len(patch) == 3 else (1, *patch[-2:])
    else:
        patch = (config.get("patch_size_t") or 1, patch, patch)
    if latents.ndim == 4:
        return patchify(latents.float(), patch, "BCHW")
    return patchify(latents.float(), patch, latent_layout(transformer))
