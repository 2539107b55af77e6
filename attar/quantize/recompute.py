"""Backward passes that compute anew what they need, for as much less memory.

A layer that learns how to be quantized keeps its shifted, scaled, rotated and rounded input and weight for its backward
pass: with them a block keeps five times as much as without. All of them come from the input and the parameters in
passes over memory, which cost little beside the products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial, update_wrapper
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")
LEAST = 1 << 22  # numbers below which there is little to save, and Python takes longer than the work
PIECE = 1 << 25  # numbers of an input that are worked on at once


def recomputed(make: Callable[..., T], *given: Any, size: int) -> T:
    """make(*given), nothing of which is kept but its result. size: numbers that it works on."""
    if size < LEAST or not torch.is_grad_enabled():
        return make(*given)
    return checkpoint(make, *given, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


@contextlib.contextmanager
def checkpointed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, each module keeps its inputs alone for the backward pass, in which it runs again."""
    former = {module: vars(module).get("forward") for module in modules}
    for module in former:
        again = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
        module.forward = update_wrapper(again, module.forward)  # with its signature
    try:
        yield
    finally:
        for module, forward in former.items():
            del module.forward
            if forward is not None:  # it had one of its own
                module.forward = forward


def recomputed_by_rows(make: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """make(x) for x (…, d) -> (…, n), which takes every row by itself, in pieces that keep nothing but their rows."""
    if x.numel() <= PIECE or not torch.is_grad_enabled():
        return recomputed(make, x, size=x.numel())
    pieces = x.flatten(0, -2).split(max(1, PIECE // x.shape[-1]))
    found = torch.cat([recomputed(make, piece, size=x.numel()) for piece in pieces])
    return found.unflatten(0, x.shape[:-1])
