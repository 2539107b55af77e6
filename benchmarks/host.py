"""What Python costs a packed layer, on any machine: `taskset -c 1 python -m benchmarks.host`.

Microseconds of one call in bfloat16, the least of some series, which other load on the machine touches least. `cpu`
with a single row of 64 numbers, so that hardly more than the call is left; `triton` with its launches left out, as on a
GPU that is never waited for. What Triton itself takes for a launch comes on top of it, two or three times a layer.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: lets the backend be chosen without a GPU

import torch
from torch import Tensor, nn

from attar.runtime import PackedLinear, use_backend
from attar.runtime.transforms import ChannelScale, ChannelShift, Hadamard, Kronecker, Transform
from attar.runtime.triton import activations, products

CALLS, SERIES, RANK = 20, 300, 8
SIDES = {64: 8, 1536: 32}  # of a Kronecker rotation, the left one
LEARNED = "shift, scale, Kronecker"  # what the default recipe makes
LAYERS = ("plain", "rotated", LEARNED, "rotated, with a branch")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'backend':<8}{'rows':>6}{'width':>7}  layer                     microseconds", flush=True)
    for backend, rows, width in (("cpu", 1, 64), ("triton", 16, 1536), ("triton", 1024, 1536)):
        x = torch.randn(rows, width, dtype=torch.bfloat16)
        layers = {name: layer(width, name) for name in LAYERS}
        runs: dict[str, nn.Module] = {"torch's linear": nn.Linear(width, width, dtype=x.dtype), **layers}
        if backend == "triton":  # where torch would compute
            runs = {name: layers[name] for name in LAYERS[:3]}
        with torch.no_grad(), use_backend(backend), no_launches():
            for name, run in runs.items():
                print(f"{backend:<8}{rows:>6}{width:>7}  {name:<26}{microseconds(run, x):8.1f}", flush=True)


def layer(width: int, name: str) -> PackedLinear:
    """W4A8 of random numbers, in bfloat16."""
    chain: list[Transform] = [] if name == "plain" else [ChannelScale(torch.rand(width) + 0.5)]
    if name == LEARNED:
        kronecker = Kronecker(torch.eye(SIDES[width]), torch.eye(width // SIDES[width]))
        chain = [ChannelShift(torch.randn(width)), *chain, kronecker]
    elif chain:
        chain += [Hadamard.random(width)]
    codes, ones = torch.randint(-8, 8, (width, width), dtype=torch.int8), torch.ones(width, 1)
    branch = (torch.randn(RANK, width), torch.randn(width, RANK)) if name.endswith("branch") else None
    return PackedLinear.from_codes(
        codes, ones, 4, torch.randn(width), 8, (0.9, 0.9), chain, branch=branch, compute_dtype=torch.bfloat16
    )


def microseconds(run: Callable[[Tensor], object], x: Tensor) -> float:
    """Of one call."""
    seconds = []
    for _ in range(SERIES):
        started = time.perf_counter()
        for _ in range(CALLS):
            run(x)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / CALLS * 1e6


class _NoLaunch:
    """Stands for a kernel, and does nothing for any grid and arguments."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getitem__(self, grid: object) -> _NoLaunch:
        return self

    def __call__(self, *args: object, **options: object) -> None:
        return None


@contextlib.contextmanager
def no_launches() -> Iterator[None]:
    """Inside, the kernels of the backend triton are not run."""
    kernels: list[tuple[Any, str, Any]] = [
        (module, name, found)
        for module in (activations, products)
        for name, found in vars(module).items()
        if type(found).__name__ in ("JITFunction", "InterpretedFunction")
    ]
    for module, name, _ in kernels:
        setattr(module, name, _NoLaunch(name))
    try:
        yield
    finally:
        for module, name, found in kernels:
            setattr(module, name, found)


if __name__ == "__main__":
    main()
