"""The types of a module's tensors, to give them back after it was computed with in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def types_of(module: nn.Module) -> dict[str, torch.dtype]:
    """Name of each parameter and buffer -> its type."""
    return {name: tensor.dtype for name, tensor in tensors_of(module)}


def give_types(module: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Casts the tensors that are named, in place; others, of layers that are new, are left as they are."""
    for name, tensor in tensors_of(module):
        if name in types:
            tensor.data = tensor.data.to(types[name])


@contextmanager
def types_kept(module: nn.Module) -> Iterator[dict[str, torch.dtype]]:
    """Inside, the tensors may get other types; an error that leaves it gives them back those that they had, which are
    yielded."""
    types = types_of(module)
    try:
        yield types
    except BaseException:
        give_types(module, types)
        raise


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by their names."""
    yield from module.named_parameters()
    yield from module.named_buffers()
