"""The rates of this CPU, measured in a few seconds: matrix products, attention and elementwise passes in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import cycle
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attar.forecast.counts import count_module
from attar.forecast.hardware import KINDS, Hardware
from attar.runtime.attention import attention
from attar.runtime.random_layer import random_layer

ROWS, WIDTH, OUT = 512, 1536, 4096
WEIGHTS = 6  # products take turns with them: in a model, too, no weight is in a cache when its turn comes
HEADS, TOKENS, HEAD = 8, 1024, 128


def measure_cpu(peaks: Mapping[str, float] | None = None, format: str = "bf16", rounds: int = 8) -> Hardware:
    """This CPU with the threads torch uses. peaks: FLOP/s and bytes/s that are given, and so not measured.

    format: "bf16" or "fp32", the one that attention and elementwise passes are measured in. The kinds run in turns and
    the median of the rounds counts, so that other load on the machine touches all alike. Integer products, and the
    attention of packed models, are those of attar's own layers, whichever backend runs them. What is measured is
    reached, so efficiencies are 1, and that of attention is its rate beside the matrix product's.
    """
    given = dict(peaks or {})
    known = {*given, "int8-few"} if "int8" in given else given
    work = {k: v for k, v in _work(format).items() if k.removeprefix("packed ") not in known}
    seen: dict[str, list[float]] = {}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, (amount, run) in work.items():
                started = time.perf_counter()
                run()
                seconds = time.perf_counter() - started
                if turn:  # the first one warms up
                    seen.setdefault(name, []).append(amount / seconds)
    found = {**{name: median(rates) for name, rates in seen.items()}, **given}
    sources = {name: "measured here and now" for name in seen} | {name: "given with --peak" for name in given}
    attention, bandwidth = found.pop("attention"), found.pop("bandwidth")
    packed = found.pop("packed attention", attention)
    threads = torch.get_num_threads()
    return Hardware(
        name="cpu",
        title=f"this CPU, {threads} thread{'s' if threads != 1 else ''}",
        rates=found,
        bandwidth=bandwidth,
        efficiency={**dict.fromkeys(KINDS, 1.0), "attention": attention / found[format]},
        sources=sources,
        packed_attention=packed / found[format],
    )


def _work(format: str) -> dict[str, tuple[float, Callable[[], object]]]:
    """name -> (operations or bytes, what to run)."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[format]

    def gemm(dtype: torch.dtype) -> Callable[[], object]:
        x = torch.randn(ROWS, WIDTH).to(dtype)
        weights = cycle([torch.randn(OUT, WIDTH).to(dtype) for _ in range(WEIGHTS)])
        return lambda: F.linear(x, next(weights))

    def packed(weight_bits: int, act_bits: int) -> Callable[[], object]:
        x = torch.randn(ROWS, WIDTH).to(dtype)
        layers = cycle([random_layer(WIDTH, OUT, weight_bits, act_bits, dtype) for _ in range(WEIGHTS)])
        return lambda: next(layers)(x)

    q, k, v = (torch.randn(1, TOKENS, HEADS, HEAD).to(dtype) for _ in range(3))
    qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
    x, scale = torch.randn(ROWS, OUT).to(dtype), torch.randn(OUT)
    moved = count_module(nn.Identity(), lambda: _elementwise(x.to("meta"), scale.to("meta"))).bytes()
    products, pairs = 2.0 * ROWS * WIDTH * OUT, 4.0 * HEADS * TOKENS * TOKENS * HEAD
    return {
        "fp32": (products, gemm(torch.float32)),
        "bf16": (products, gemm(torch.bfloat16)),
        "int8": (products, packed(8, 8)),
        "int8-few": (products, packed(4, 8)),
        "attention": (pairs, lambda: F.scaled_dot_product_attention(qh, kh, vh)),
        "packed attention": (pairs, lambda: attention(q, k, v)),
        "bandwidth": (moved, lambda: _elementwise(x, scale)),
    }


def _elementwise(x: Tensor, scale: Tensor) -> Tensor:
    """What stands between the products of a block: a modulated norm in float32, and an activation."""
    normed = F.layer_norm(x.float(), x.shape[-1:])
    modulated = (normed * (1 + scale) + scale).to(x.dtype)
    return F.gelu(modulated, approximate="tanh") + x * x
