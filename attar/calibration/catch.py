"""Catches what the model calls one of its blocks with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.models.adapter import ModelAdapter, evaluating
from attar.models.block import BlockCall, bind
from attar.models.tree import map_tensors
from attar.models.weights import weights_of


class _Reached(Exception):
    """Stops the forward at the block that was waited for."""


def catch_block_calls(
    transformer: nn.Module,
    adapter: ModelAdapter,
    block_index: int,
    calls: Sequence[Mapping[str, Any]],
    store_device: torch.device | str | None = None,
) -> list[BlockCall]:
    """The calls of block `block_index` for each transformer call (keyword arguments), in the same order.

    The model runs only up to that block, without gradient and in evaluation mode, on its own device; what is
    caught is kept on `store_device` (default: where it was made). If the adapter has not observed the model
    yet, it does so with the first call. Constants that are equal over calls (rotary tables, text) are kept
    once.
    Raises AttarError if there are no calls, or the model ends without running the block.
    """
    if not calls:
        raise AttarError("there are no transformer calls to catch block inputs from")
    adapter.observe(calls[0])
    block = adapter.blocks[block_index]
    caught: list[BlockCall] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = bind(module, args, kwargs)
        streams = {name: _keep(given.pop(name), store_device) for name in block.streams}
        known = _tensors(caught[-1].constants) if caught else []
        constants = map_tensors(given, lambda t: _shared(_keep(t, store_device), known))
        caught.append(BlockCall(streams, constants))
        raise _Reached

    device = weights_of(transformer).device
    handle = block.module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with evaluating(transformer):
            for call in calls:
                try:
                    transformer(**map_tensors(dict(call), lambda tensor: tensor.to(device)))
                except _Reached:
                    continue
                raise AttarError("the model ended without running the block", where=block.name)
    finally:
        handle.remove()
    return caught


def _keep(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    moved = tensor.detach().to(tensor.device if device is None else device)
    if moved.data_ptr() != tensor.data_ptr():
        return moved.contiguous()
    # memory of its own, since the model may go on to write into what it was given
    return moved.clone(memory_format=torch.contiguous_format)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def _shared(tensor: Tensor, known: Sequence[Tensor]) -> Tensor:
    """The tensor of the previous call with the same content, if there is one."""
    for other in known:
        same_kind = (other.shape, other.dtype, other.device) == (tensor.shape, tensor.dtype, tensor.device)
        if same_kind and torch.equal(other, tensor):
            return other
    return tensor
