"""Plain reconstruction losses over the output streams of a block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attar.errors import AttarError


def mse(pred: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error over all elements of all streams.

    pred, target: stream → (B, N_stream, d). Returns a float32 scalar.
    Raises AttarError when the streams differ.
    """
    if not pred or set(pred) != set(target):
        raise AttarError(f"block outputs {sorted(pred)} but its targets are {sorted(target)}")
    total, count = None, 0
    for name, output in pred.items():
        squared = (output.float() - target[name].float()).square().sum()
        total = squared if total is None else total + squared
        count += output.numel()
    assert total is not None
    return total / count


def relative_error(
    pred: Mapping[str, Tensor], target: Mapping[str, Tensor], source: Mapping[str, Tensor]
) -> Tensor:
    """Squared error relative to the block's own update ‖y − x‖²: 1 is as bad as no block at all.

    pred, target, source: stream → (B, N_stream, d), source being the block's input. Where a block gives a stream
    another shape all of its output is the update, and so it is of a block that changes nothing, as a pruned one.
    Returns a scalar.
    """
    error = sum((pred[name].float() - target[name].float()).square().sum() for name in pred)
    update = sum(
        (target[name].float() - (source[name].float() if source[name].shape == target[name].shape else 0))
        .square().sum() for name in pred
    )  # fmt: skip
    assert isinstance(error, Tensor) and isinstance(update, Tensor)
    whole = sum(target[name].float().square().sum() for name in pred)
    return error / torch.where(update > 0, update, whole).clamp(min=torch.finfo(torch.float32).tiny)


def mse_with_layers(
    pred: Mapping[str, Tensor], target: Mapping[str, Tensor], main: str, weight: float
) -> Tensor:
    """The error of the model's output, and `weight` times that of each layer that is compared too (QuEST's global and
    local supervision, arXiv 2402.03666).

    pred, target: stream → tensor; `main` is the model's output. Each error is a mean over its elements.
    Returns a scalar.
    """
    parts = {name: mse({name: pred[name]}, {name: target[name]}) for name in target}
    local = sum(part for name, part in parts.items() if name != main)
    return parts[main] + weight * local
