"""Nested arguments (dicts, lists, tuples of tensors and plain values) mapped, and flattened for storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attar.errors import AttarError


def map_tensors(value: Any, fn: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor t in its dicts, lists and tuples replaced by fn(t)."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, fn) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple takes its fields one by one
        return type(value)(*(map_tensors(v, fn) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(v, fn) for v in value)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in the dicts, lists and tuples of `value`, in order."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def tokens_of(x: Tensor) -> Tensor:
    """A stream as tokens: (B, N, d) as it is, and the features (B, C, H, W) of a U-Net as (B, H·W, C)."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def flatten(value: Any, name: str, put: Callable[[str, Tensor], str]) -> Any:
    """A JSON-able description of `value`, whose tensors are handed to `put`.

    `put(path, tensor)` stores a tensor, and returns the key under which `unflatten` finds it again; `path` is
    the dotted place of the tensor inside `value`. Raises AttarError for a value that has no plain form.
    """
    if isinstance(value, Tensor):
        return {"tensor": put(name, value)}
    if isinstance(value, dict):
        if not all(isinstance(k, str) for k in value):
            raise AttarError("only dictionaries with text keys can be stored", where=name)
        return {"dict": {k: flatten(v, f"{name}.{k}", put) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [flatten(v, f"{name}.{i}", put) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise AttarError(f"an argument of type {type(value).__name__} cannot be stored", where=name)


def unflatten(spec: Any, get: Callable[[str], Tensor]) -> Any:
    """The value that `flatten` described; `get(key)` gives its tensors."""
    ((kind, content),) = spec.items()
    if kind == "tensor":
        return get(content)
    if kind == "dict":
        return {k: unflatten(v, get) for k, v in content.items()}
    if kind in ("list", "tuple"):
        items = [unflatten(v, get) for v in content]
        return tuple(items) if kind == "tuple" else items
    return getattr(torch, content) if kind == "dtype" else content
