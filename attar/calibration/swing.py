"""Strided convolutions that look from a little aside while data are synthesised (Genie, arXiv 2212.04780)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.errors import AttarError


def strided(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The 2D convolutions with a stride, by their dotted names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1}


@contextmanager
def swinging(model: nn.Module, shift: int, generator: torch.Generator) -> Iterator[None]:
    """Inside, the input of each strided convolution is moved by up to `shift` pixels, anew in every call.

    A strided convolution passes gradients to the pixels of its input unequally, and in data that follow them this
    shows as a checkerboard. So the input is padded by reflection, and cut back to its size at random, alike for the
    whole batch. Nothing of the model changes; a shift of 0 is the plain convolution. generator: on the CPU.
    Raises AttarError for a model without such convolutions, for a negative shift, and for an input that is no larger
    than the shift.
    """
    if shift < 0:
        raise AttarError(f"a convolution cannot swing by {shift} pixels", fix="Use 0, or 1 as in Genie")
    found = strided(model)
    if shift and not found:
        raise AttarError(
            "no convolution has a stride, so none can swing", where=type(model).__name__, fix="Set swing to 0"
        )
    handles = [layer.register_forward_pre_hook(_moving(n, shift, generator)) for n, layer in found.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moving(name: str, shift: int, generator: torch.Generator) -> Any:
    def move(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        height, width = x.shape[-2:]
        if shift >= min(height, width):
            raise AttarError(
                f"an input of {height}×{width} pixels cannot be moved by {shift}",
                where=name,
                fix="Set swing to 0, or synthesise larger data",
            )
        top, left = torch.randint(2 * shift + 1, (2,), generator=generator).tolist()
        padded = F.pad(x, (shift,) * 4, mode="reflect")
        return (padded[..., top : top + height, left : left + width], *rest)

    return move
