"""Speed and memory of every competitor on one block of a real model's shapes, all in one run, in turns."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from attar.bench.subject import BenchBlock, bench_blocks, latent_grid, pack_block
from attar.bench.timing import faster, interleave
from attar.forecast.architecture import find_architecture
from attar.models.block import BlockCall, run_block
from attar.recipe import load_recipe
from benchmarks.peers.competitors import Competitor, Task
from benchmarks.peers.quality import linear_bytes
from benchmarks.store import failure

BASELINE = "bf16"


class OneBlock(nn.Module):
    """A block under the name that it has in its transformer, called with the arguments of a block."""

    def __init__(self, block: nn.Module, outputs: tuple[str | None, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])
        self.outputs = outputs
        self.config = None

    def forward(self, return_dict: bool = False, **arguments: Any) -> tuple[Tensor, ...]:
        found = run_block(self.blocks[0], BlockCall({}, arguments), self.outputs)
        return tuple(found.values())


@dataclass
class Ready:
    """A competitor that is prepared: what to run, and what its linears weigh."""

    run: Callable[[], object]
    bytes: int


def measure_speed(
    competitors: Sequence[Competitor],
    shape: str,
    tokens: int,
    rounds: int,
    device: torch.device | str = "cpu",
    instead: Callable[[Callable[[], object]], Callable[[], object]] = lambda run: run,
) -> dict[str, dict[str, Any]]:
    """Seconds of a block, times faster than bf16 with its spread, and bytes of the linears; or the error.

    Libraries that only simulate are left out. instead: what is timed in the place of a call, made of the call.
    Raises AttarError for an unknown shape.
    """
    ready: dict[str, Ready] = {}
    found: dict[str, dict[str, Any]] = {}
    blocks: dict[torch.dtype, BenchBlock] = {}
    for competitor in competitors:
        if competitor.simulated:
            found[competitor.name] = {"error": "simulated in floating point: its speed here says nothing"}
            continue
        started = time.perf_counter()
        try:
            if competitor.dtype not in blocks:
                blocks[competitor.dtype] = _block(shape, tokens, competitor.dtype, device)
            prepared = _prepare(competitor, blocks[competitor.dtype])
            with torch.no_grad():
                ready[competitor.name] = Ready(instead(prepared.run), prepared.bytes)
        except Exception as error:  # a failure is a result too
            found[competitor.name] = failure(error)
        seconds = time.perf_counter() - started
        print(
            f"{shape}, {tokens} tokens, {competitor.name}: ready in {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    found |= in_turns(ready, rounds, device)
    return {c.name: found[c.name] for c in competitors}


def in_turns(
    ready: Mapping[str, Ready], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Median seconds, times faster than bf16 where that runs too, and bytes of each."""
    seconds = interleave({name: r.run for name, r in ready.items()}, rounds, device)
    found: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        found[name] = {"seconds": median(values), "bytes": ready[name].bytes}
        if BASELINE in seconds:
            found[name]["faster"] = faster(seconds[BASELINE], values).to_json()
    return found


def _block(shape: str, tokens: int, dtype: torch.dtype, device: torch.device | str) -> BenchBlock:
    torch.manual_seed(0)
    architecture = find_architecture(shape)
    return bench_blocks(architecture, latent_grid(architecture, tokens), 512, dtype, device)[0]


def _prepare(competitor: Competitor, block: BenchBlock) -> Ready:
    call = {**block.call.constants, **block.call.streams}

    def attar(recipe: str, weights: int, acts: int) -> nn.Module:
        bits = {"quantize.weights": weights, "quantize.acts": acts}
        return OneBlock(pack_block(block, load_recipe(recipe, bits)), block.outputs)

    task = Task(OneBlock(copy.deepcopy(block.dense), block.outputs), [call], attar)
    with torch.no_grad():
        module = competitor.make(task)
        if competitor.compiled:
            module = torch.compile(module)
        module(**call, return_dict=False)  # whatever is compiled or cached at first
    return Ready(lambda: module(**call, return_dict=False), linear_bytes(module))
