"""Calibration samples put together to a batch, and moved to where a model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attar.errors import AttarError

Streams = Mapping[str, Tensor]


def join(samples: list[tuple[Any, Streams, Any]]) -> tuple[Any, Streams, Any]:
    """Several samples (call, target streams, context) as one along the batch axis."""
    if len(samples) == 1:
        return samples[0]
    calls, targets, contexts = zip(*samples, strict=True)
    target = {name: torch.cat([t[name] for t in targets]) for name in targets[0]}
    return concatenate_calls(calls), target, _concatenate(list(contexts), None, "context")


def concatenate_calls(calls: Sequence[Any]) -> Any:
    """Several BlockCalls as one along the batch axis.

    Streams are concatenated. Of the constants, tensors whose first axis is as long as the call's batch are
    concatenated too; everything else has to be equal in all calls, and is kept. Raises AttarError if it is
    not, when shapes differ, or for calls of several groups of steps.
    """
    _concatenate([call.group for call in calls], None, "group")
    sizes = [next(iter(call.streams.values())).shape[0] for call in calls]
    streams = _concatenate([call.streams for call in calls], sizes, "streams")
    constants = _concatenate([call.constants for call in calls], sizes, "constants")
    return replace(calls[0], streams=streams, constants=constants)


def _concatenate(values: list[Any], sizes: list[int] | None, where: str) -> Any:
    first = values[0]
    kinds = {_kind(value) for value in values}
    if len(kinds) > 1:
        raise AttarError("calls that differ cannot be batched", where=where, fix="Use batch_size=1")
    if isinstance(first, Mapping):
        return {key: _concatenate([v[key] for v in values], sizes, f"{where}.{key}") for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(_concatenate([v[i] for v in values], sizes, where) for i in range(len(first)))
    if not isinstance(first, Tensor):
        same = all(value == first for value in values[1:])
    elif first.ndim and (sizes is None or all(v.shape[0] == n for v, n in zip(values, sizes, strict=True))):
        if any(v.shape[1:] != first.shape[1:] for v in values):
            raise AttarError(
                "calls of different shapes cannot be batched", where=where, fix="Use batch_size=1"
            )
        return torch.cat(values)
    else:
        same = all(torch.equal(value, first) for value in values[1:])
    if not same:
        raise AttarError("calls that differ cannot be batched", where=where, fix="Use batch_size=1")
    return first


def _kind(value: Any) -> Any:
    """What values that go together have in common: the keys, the length, or being a tensor."""
    if isinstance(value, Mapping):
        return frozenset(value)
    if isinstance(value, (tuple, list)):
        return type(value), len(value)
    return isinstance(value, Tensor)


def like(target: Streams, prediction: Streams) -> Streams:
    """Targets on the device of the prediction; they may be kept elsewhere."""
    device = next(iter(prediction.values())).device
    return {name: value.to(device, non_blocking=True) for name, value in target.items()}


def to_device(context: Any, prediction: Streams) -> Any:
    """A sample's context on the device of the prediction."""
    if isinstance(context, Mapping):
        device = next(iter(prediction.values())).device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in context.items()}
    return context
