"""Blocks that are alike, of which one is run and counted: the others give what it gave, under their own names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from attar.models.tree import map_tensors, tensors_of

_PLAIN = (bool, int, float, str, type, torch.dtype, FunctionType, BuiltinFunctionType)


class Alike:
    """Calls of blocks whose operations are known from an earlier block.

    operations: the list that everything counted is appended to: dataclasses that say the `name` of what was done and
    the `block` in which it was.
    """

    def __init__(self, operations: list[Any]) -> None:
        self.operations = operations
        self.seen: dict[Any, tuple[str, Any, list[Any]]] = {}

    @contextmanager
    def watch(self, name: str, block: nn.Module, roles: tuple[tuple[str, str], ...]) -> Iterator[None]:
        """Inside, a call of the block is not run where one alike was: same structure, same roles of its linears by
        their names in it, and arguments of the same shapes. name: dotted, of the block."""
        run, structure = block.forward, (_structure(block), roles)

        def forward(*args: Any, **kwargs: Any) -> Any:
            key = structure, signature(args), signature(kwargs)
            if key in self.seen:
                return self._again(name, *self.seen[key])
            start = len(self.operations)
            result = run(*args, **kwargs)
            if all(t.is_meta for t in tensors_of(result)):
                self.seen[key] = name, result, self.operations[start:]
            return result

        block.forward = forward
        try:
            yield
        finally:
            del block.forward

    def _again(self, name: str, first: str, outline: Any, operations: list[Any]) -> Any:
        def own(place: str) -> str:
            return f"{name}{place.removeprefix(first)}" if place.startswith(f"{first}.") else place

        self.operations += [replace(o, name=own(o.name), block=name) for o in operations]
        return map_tensors(outline, blank)


def blank(like: Tensor) -> Tensor:
    """A tensor of the same shape, strides and type on the meta device; making it is no operation."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")


def signature(value: Any) -> Any:
    """What the shapes of a function's outputs depend on, as a key; one with data in it is like no other."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else object()
    if isinstance(value, (list, tuple)):
        return tuple(map(signature, value))
    if isinstance(value, dict):
        return tuple((name, signature(part)) for name, part in value.items())
    return type(value), value


def _structure(block: nn.Module) -> Any:
    """What a block does, as a key: the classes, settings and shapes of all that it consists of."""
    return tuple(
        (
            path,
            type(part),
            tuple((name, _setting(value)) for name, value in vars(part).items() if "hook" not in name),
        )
        for path, part in block.named_modules()
    )


def _setting(value: Any, deep: bool = True) -> Any:
    """What a module keeps, as a key: of tensors the shape, of modules inside it the class. An object (an attention's
    processor) is its class and its own settings, and what these consist of their classes alone."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_setting(part, deep) for part in value)
    if isinstance(value, dict):  # its parameters too
        return type(value), tuple((str(name), _setting(part, deep)) for name, part in value.items())
    own = vars(value) if deep and hasattr(value, "__dict__") and not isinstance(value, nn.Module) else {}
    return type(value), tuple((name, _setting(part, deep=False)) for name, part in own.items())
