"""Catches what the model calls its blocks with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.models.adapter import Block, ModelAdapter, evaluating
from attar.models.block import BlockCall, bind
from attar.models.tree import map_tensors, tensors_of
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
    caught: list[BlockCall] = []
    for found in each_catch(transformer, adapter, [block_index], calls, store_device):
        call = found[block_index]
        known = tensors_of(caught[-1].constants) if caught else []
        constants = map_tensors(call.constants, lambda t, known=known: _shared(t, known))
        caught.append(BlockCall(call.streams, constants))
    return caught


def each_catch(
    transformer: nn.Module,
    adapter: ModelAdapter,
    indices: Sequence[int],
    calls: Sequence[Mapping[str, Any]],
    store_device: torch.device | str | None = None,
) -> Iterator[dict[int, BlockCall]]:
    """For each transformer call the calls of several blocks, by their index, all from one forward.

    As `catch_block_calls`, but nothing is kept from one call to the next.
    """
    if not calls:
        raise AttarError("there are no transformer calls to catch block inputs from")
    adapter.observe(calls[0])
    blocks = {index: adapter.blocks[index] for index in sorted(indices)}
    last = max(blocks)
    caught: dict[int, BlockCall] = {}

    def hook(index: int, block: Block) -> Any:
        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = bind(module, args, kwargs)
            streams = {name: _keep(given.pop(name), store_device) for name in block.streams}
            caught[index] = BlockCall(streams, map_tensors(given, lambda t: _keep(t, store_device)))
            if index == last:
                raise _Reached

        return keep

    device = weights_of(transformer).device
    for call in calls:
        handles = [
            block.module.register_forward_pre_hook(hook(index, block), with_kwargs=True)
            for index, block in blocks.items()
        ]
        try:
            with evaluating(transformer):
                adapter.entry(**map_tensors(dict(call), lambda tensor: tensor.to(device)))
        except _Reached:
            pass
        else:
            raise AttarError("the model ended without running the block", where=blocks[last].name)
        finally:
            for handle in handles:
                handle.remove()
        found, caught = caught, {}
        yield found


def _keep(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    moved = tensor.detach().to(tensor.device if device is None else device)
    if moved.data_ptr() != tensor.data_ptr():
        return moved.contiguous()
    # memory of its own, since the model may go on to write into what it was given
    return moved.clone(memory_format=torch.contiguous_format)


def _shared(tensor: Tensor, known: Sequence[Tensor]) -> Tensor:
    """The tensor of the previous call with the same content, if there is one."""
    for other in known:
        same_kind = (other.shape, other.dtype, other.device) == (tensor.shape, tensor.dtype, tensor.device)
        if same_kind and torch.equal(other, tensor):
            return other
    return tensor
