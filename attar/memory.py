"""Main memory: how much can still be had, and tensors that lie in files where there is too little of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil
import torch
from torch import Tensor

from attar.errors import AttarError, reason

SMALL = 1 << 20  # bytes of a tensor that is not worth a file
RESERVE = 0.2  # of the memory that there is, for everything else
_GROUP = Path("/sys/fs/cgroup")


def total_memory() -> int:
    """Bytes that this process and its like may have: of the machine, or of its container."""
    limit = _group_limit()
    whole = psutil.virtual_memory().total
    return whole if limit is None else min(whole, limit)


def free_memory() -> int:
    """Bytes that can still be had, what the system only keeps of files among them."""
    free, limit = psutil.virtual_memory().available, _group_limit()
    if limit is None:
        return free
    used = int((_GROUP / "memory.current").read_text())
    stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
    kept = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
    return min(free, max(0, limit - used + kept))


def _group_limit() -> int | None:
    try:
        text = (_GROUP / "memory.max").read_text().strip()
        return None if text == "max" else int(text)
    except (OSError, ValueError):
        return None


def hold(tensor: Tensor, folder: Path) -> Tensor:
    """The tensor on the CPU: in memory, or in a file of the folder where memory is getting short.

    Such a file has no name, so it is gone with the tensor and with the process. It is mapped into memory: the system
    keeps of it what there is room for, and reads the rest anew. Raises AttarError when the disk is full.
    """
    tensor = tensor.detach()
    if tensor.nbytes < SMALL or free_memory() - tensor.nbytes >= RESERVE * total_memory():
        return tensor.to("cpu")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="sample-") as file:
            if hasattr(os, "posix_fallocate"):  # without it a full disk is a bus error
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            held = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise AttarError(
            f"calibration samples fit neither into memory nor on the disk ({reason(error)})",
            where=str(folder),
            fix="Make room there, ask for fewer samples (select.count), or calibrate at fewer frames",
        ) from error
    return held.view(tensor.shape).copy_(tensor)
