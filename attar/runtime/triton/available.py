"""Whether the Triton kernels can run here. Imports Triton only when asked."""

from __future__ import annotations

import functools
import os

import torch

from attar.errors import AttarError

LEAST = (8, 0)  # compute capability from which tensor cores multiply the bytes that Triton gives them


_LEAST_MEMORY = 99 * 1024
_TILES = 200 * 1024  # bytes of shared memory that the tiles of many rows take


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; in the interpreter, and before torch 2.7, those of the GPUs that have least."""
    if device.type != "cuda":
        return _LEAST_MEMORY
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", _LEAST_MEMORY)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; in the interpreter 2, so that a program takes several rows or tiles."""
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def copies_tiles(device: torch.device) -> bool:
    """Whether Triton and the device copy whole tiles into large shared memories: Hopper, and Blackwell's large ones."""
    try:
        import triton.tools.tensor_descriptor  # noqa: F401  since Triton 3.4
    except ImportError:
        return False
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) >= (9, 0) and shared_memory(device) > _TILES


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU, one program after another: for tests only."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def describe_triton() -> str:
    """A sentence for people about the backend. Raises AttarError, the same each time, where it cannot work."""
    found = _look(interpreting())
    if isinstance(found, AttarError):  # anew: one that is raised again and again collects tracebacks
        raise AttarError(found.what, where=found.where, fix=found.fix)
    return found


@functools.cache
def _look(interpreted: bool) -> str | AttarError:
    try:
        import triton
    except ImportError:
        return AttarError("Triton is not installed", fix="pip install triton")
    version = f"Triton {triton.__version__}"
    if interpreted:
        return f"triton: kernels in the interpreter of {version}, on the CPU, for tests; very slow"
    if torch.version.hip is not None:
        return AttarError("the kernels are written for NVIDIA GPUs")
    if not torch.cuda.is_available():
        return AttarError("there is no CUDA device")
    for index in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(index) < LEAST:
            name = torch.cuda.get_device_name(index)
            return AttarError(
                "the kernels need compute capability {}.{} or higher".format(*LEAST),
                where=name,
                fix="Hide the device with CUDA_VISIBLE_DEVICES",
            )
    try:  # builds and loads what Triton needs to talk to the driver
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return AttarError(f"{version} does not work with this device ({' '.join(str(error).split())[:200]})")
    return (
        f"triton: GPU kernels ({version}) with the integers of the reference on int8 tensor cores; weights stay packed "
        "in memory, and float64 inputs run on the reference"
    )
