"""The rates of this CPU, measured in a few seconds: matrix products, attention and memory traffic in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from attar.forecast.hardware import KINDS, Hardware

ROWS, WIDTH, OUT = 512, 1536, 4096
HEADS, TOKENS, HEAD = 8, 1024, 128
STREAM = 4 * 2**20  # elements: as large as activations are, smaller than what the allocator gives back each time


def measure_cpu(peaks: Mapping[str, float] | None = None, format: str = "bf16", rounds: int = 5) -> Hardware:
    """This CPU with the threads torch uses. peaks: FLOP/s and bytes/s that are given, and so not measured.

    format: "bf16" or "fp32", the one that attention and traffic are measured in. The kinds run in turns and the best
    of the rounds counts, so that other load on the machine touches all alike. A rate that torch has no kernel for
    here (integer products on some processors) is absent. What is measured is reached, so efficiencies are 1, and that
    of attention is its rate beside the matrix product's.
    """
    given = dict(peaks or {})
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[format]
    work = {k: v for k, v in _work(dtype).items() if k not in given}
    best: dict[str, float] = {}
    with torch.no_grad():
        for _ in range(rounds + 1):  # the first round warms up
            for name, (amount, run) in list(work.items()):
                try:
                    started = time.perf_counter()
                    run()
                    best[name] = max(best.get(name, 0.0), amount / (time.perf_counter() - started))
                except RuntimeError:  # no such kernel in this build
                    del work[name]
    sources = {name: "measured here and now" for name in best} | {name: "given with --peak" for name in given}
    found = {**best, **given}
    attention, bandwidth = found.pop("attention"), found.pop("bandwidth")
    threads = torch.get_num_threads()
    return Hardware(
        name="cpu",
        title=f"this CPU, {threads} thread{'s' if threads != 1 else ''}",
        rates=found,
        bandwidth=bandwidth,
        efficiency={**dict.fromkeys(KINDS, 1.0), "attention": attention / found[format]},
        sources=sources,
    )


def _work(dtype: torch.dtype) -> dict[str, tuple[float, Callable[[], object]]]:
    """name -> (operations or bytes, what to run)."""

    def gemm(dtype: torch.dtype) -> Callable[[], object]:
        x, w = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(OUT, WIDTH).to(dtype)
        return lambda: F.linear(x, w)

    a = torch.randint(-8, 8, (ROWS, WIDTH), dtype=torch.int8)
    b = torch.randint(-8, 8, (WIDTH, OUT), dtype=torch.int8)
    q, k, v = (torch.randn(1, HEADS, TOKENS, HEAD).to(dtype) for _ in range(3))
    x, y = torch.randn(STREAM).to(dtype), torch.randn(STREAM).to(dtype)
    products = 2.0 * ROWS * WIDTH * OUT
    return {
        "fp32": (products, gemm(torch.float32)),
        "bf16": (products, gemm(torch.bfloat16)),
        "int8": (products, lambda: torch._int_mm(a, b)),
        "attention": (4.0 * HEADS * TOKENS * TOKENS * HEAD, lambda: F.scaled_dot_product_attention(q, k, v)),
        "bandwidth": (3.0 * x.nbytes, lambda: x + y),
    }
