"""Leaving autocast: numbers that are rounded to codes need more digits than it keeps."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def as_linear(z: Tensor, x: Tensor) -> Tensor:
    """A product z of the input x in the type in which a linear gives it: x's, or that of autocast."""
    return z if autocasts(x.device) else z.to(x.dtype)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, autocast is off."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else contextlib.nullcontext()
