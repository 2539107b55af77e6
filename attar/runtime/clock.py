"""The clock that work on a device is timed with."""

from __future__ import annotations

import time

import torch


def now(device: torch.device | str) -> float:
    """The clock in seconds, once the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
