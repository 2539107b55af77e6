"""Quality of every competitor on digits-video: the same prompts, the same noise, the same metrics."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from attar.quantize.linear import replace_module
from attar.runtime.layers import PackedLinear
from benchmarks.cells import Method
from benchmarks.peers.competitors import BLOCKS, Competitor, Task
from benchmarks.protocol import Bench
from benchmarks.quality import compress

CALIBRATION_CALLS = 20


def measure_quality(bench: Bench, competitor: Competitor, prompts: int) -> dict[str, Any]:
    """Figures of one competitor, paired with full precision in float32."""
    pipe = bench.load()
    calls = calibration_calls(bench)

    def attar(recipe: str, weights: int, acts: int) -> nn.Module:
        packed = compress(bench, Method(recipe, recipe).resolve((weights, acts)))[0].transformer
        for name, module in packed.named_modules():
            if isinstance(module, PackedLinear):
                replace_module(pipe.transformer, name, module.to(competitor.dtype))
        return pipe.transformer

    if competitor.dtype != torch.float32:  # read again: diffusers keeps norms and tables in float32
        folder = bench.source.folder / "transformer"
        pipe.transformer = type(pipe.transformer).from_pretrained(folder, torch_dtype=competitor.dtype)
    calls = [_cast(call, competitor.dtype) for call in calls]
    started = time.time()
    transformer = competitor.make(Task(pipe.transformer, calls, attar))
    seconds = time.time() - started
    if competitor.compiled:
        transformer = torch.compile(transformer)
    pipe.register_modules(transformer=transformer)
    figures = bench.measure_videos(pipe, prompts)
    return {
        "psnr": sum(figures["psnr"]) / prompts,
        "ssim": sum(figures["ssim"]) / prompts,
        "accuracy": figures["accuracy"],
        "reference_accuracy": figures["reference_accuracy"],
        "bytes": None if competitor.simulated else linear_bytes(transformer),
        "seconds_to_quantize": round(seconds, 1),
        "seconds_per_video": round(figures["sampling_seconds"] / prompts, 3),
    }


def calibration_calls(bench: Bench) -> list[dict[str, Any]]:
    """Full-precision calls of the transformer spread over prompts and steps, each of one guidance branch."""
    places = [
        (k % len(bench.prompts), round(k * (bench.steps - 1) / (CALIBRATION_CALLS - 1)))
        for k in range(CALIBRATION_CALLS)
    ]
    return [bench.store.calls("transformer", p, step)[0] for p, step in places]


def _cast(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The call with its floating-point tensors in the dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }


def linear_bytes(transformer: nn.Module) -> int:
    """Bytes of weights, scales and transforms of the blocks, whatever tensor class holds them."""
    if hasattr(transformer, "linear_bytes"):  # weights that PyTorch does not hold
        return transformer.linear_bytes
    held = [*transformer.named_parameters(), *transformer.named_buffers()]
    return sum(_bytes(tensor) for name, tensor in held if f".{BLOCKS}" in f".{name}")


def _bytes(tensor: Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    return sum(_bytes(getattr(tensor, name)) for name in flatten()[0])
