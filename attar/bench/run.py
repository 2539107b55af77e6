"""`attar bench`: latency by part, memory and size of a packed model's blocks, beside dense ones in the same run."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from attar.bench.limit import measure_limit
from attar.bench.parts import parts_of, timing_parts
from attar.bench.subject import BenchBlock
from attar.bench.timing import faster, interleave
from attar.evaluate.size import folder_bytes
from attar.runtime.backend import INTEGERS
from attar.runtime.describe import describe_backend
from attar.runtime.layers import packed_layers

BASELINE, PACKED = "dense", "packed"
BARE = "packed without transforms"


@dataclass
class Measured:
    """Seconds of a block in every round: whole, and by part."""

    whole: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)


def bench_block(
    block: BenchBlock, packed: nn.Module, rounds: int, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Everything that is known of one kind of block, in seconds and bytes.

    Whole blocks and their parts are measured in different rounds, so that the clocks of the parts do not count. What
    transforms take, which run inside the packed linears, is what these take less without them.
    """
    modules = {BASELINE: block.dense, PACKED: packed}
    whole = interleave({k: _runner(block, m) for k, m in modules.items()}, rounds, device)
    seen = {name: Measured(seconds) for name, seconds in whole.items()}
    parts = parts_of(block.dense, block.roles, block.attentions)

    seen[BARE] = Measured()

    def run_in_parts(name: str) -> Callable[[], None]:
        module = modules[BASELINE if name == BASELINE else PACKED]

        def run() -> None:
            taken_off = without_transforms(module) if name == BARE else nullcontext()
            with taken_off, timing_parts(module, parts, device) as seconds:
                block.run(module)
            seen[name].parts.append(seconds)

        return run

    transformed = any(len(layer.transforms) for layer in packed_layers(packed).values())
    interleave({name: run_in_parts(name) for name in seen if transformed or name != BARE}, rounds, device)
    for measured in seen.values():
        del measured.parts[:1]  # the round that warms up
    bare = seen.pop(BARE)
    names = sorted({name for measured in seen.values() for seconds in measured.parts for name in seconds})
    linears = sorted(set(block.roles.values()))
    rows = [_row(name, seen, [name]) for name in names]
    return {
        "block": block.kind,
        "count": block.count,
        "whole": _row("whole", seen, None),
        "linears": _row("linears", seen, [name for name in names if name in linears]),
        "parts": rows,
        "transforms": {
            "part": "transforms, in the linears",
            "seconds": {BASELINE: 0.0, PACKED: _more(seen[PACKED], bare, linears)},
        },
        "weight_bytes": {name: linear_bytes(module, block) for name, module in modules.items()},
    }


def bench_model(
    pairs: list[tuple[BenchBlock, nn.Module]],
    rounds: int,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """All kinds of blocks, each with its packed one, and the blocks of one forward together.

    folder: of a checkpoint, for its size on disk. dtype: of the dense blocks, whose products the limit is beside.
    """
    measured = [bench_block(block, packed, rounds, device) for block, packed in pairs]
    step, linears = (
        {
            name: sum(row["count"] * row[part]["seconds"][name] for row in measured)
            for name in (BASELINE, PACKED)
        }
        for part in ("whole", "linears")
    )
    limit = measure_limit(dtype, rounds, device, _usual_bits([packed for _, packed in pairs]))
    weights = {
        name: sum(row["count"] * row["weight_bytes"][name] for row in measured) for name in (BASELINE, PACKED)
    }
    return {
        "backend": describe_backend([packed for _, packed in pairs], device),
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "blocks": measured,
        "step_seconds": {**step, "ratio": step[BASELINE] / step[PACKED]},
        "linears_limit": {
            **limit,
            "reached": linears[BASELINE] / linears[PACKED] / limit["faster"]["value"],
        },
        "weight_bytes": {**weights, "share": weights[PACKED] / weights[BASELINE]},
        "peak_memory": _peak_memory(device),
        "disk_bytes": None if folder is None else folder_bytes(folder),
    }


def _usual_bits(blocks: list[nn.Module]) -> tuple[int, int]:
    """The bits of weights and activations of most of the layers' weights, among integer products; else of bytes."""
    count: Counter[tuple[int, int]] = Counter()
    for block in blocks:
        for layer in packed_layers(block).values():
            if layer.act_bits is not None and (layer.weight_format, layer.act_format) in INTEGERS:
                count[layer.weight_bits, layer.act_bits] += layer.in_features * layer.out_features
    return count.most_common(1)[0][0] if count else (8, 8)


@contextmanager
def without_transforms(module: nn.Module) -> Iterator[None]:
    """Inside, packed layers run as if they had none."""
    kept = {layer: layer.transforms for layer in packed_layers(module).values()}
    try:
        for layer in kept:
            layer.transforms = nn.ModuleList()
        yield
    finally:
        for layer, transforms in kept.items():
            layer.transforms = transforms


def _more(whole: Measured, bare: Measured, parts: list[str]) -> float:
    """Median seconds by which the parts together take longer than in the other, round by round; 0 if unmeasured."""
    sums = ([sum(s.get(n, 0.0) for n in parts) for s in m.parts] for m in (whole, bare))
    return median([a - b for a, b in zip(*sums, strict=False)] or [0.0])


def linear_bytes(module: nn.Module, block: BenchBlock) -> int:
    """Bytes of the block's linears: weights or codes, scales, transforms, biases."""
    found = [module.get_submodule(name) for name in block.roles]
    return sum(t.nbytes for linear in found for t in [*linear.parameters(), *linear.buffers()])


def _runner(block: BenchBlock, module: nn.Module) -> Callable[[], object]:
    return lambda: block.run(module)


def _row(label: str, seen: dict[str, Measured], parts: list[str] | None) -> dict[str, Any]:
    """Median seconds of the sum of some parts (None: of the whole block), and how many times faster packed is."""

    def rounds(measured: Measured) -> list[float]:
        if parts is None:
            return measured.whole
        return [sum(seconds.get(name, 0.0) for name in parts) for seconds in measured.parts]

    series = {name: rounds(measured) for name, measured in seen.items()}
    return {
        "part": label,
        "seconds": {name: median(values) for name, values in series.items()},
        "faster": faster(series[BASELINE], series[PACKED]).to_json(),
    }


def _peak_memory(device: torch.device | str) -> int:
    """Bytes: on CUDA of torch's allocator, else the process's largest resident set."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
