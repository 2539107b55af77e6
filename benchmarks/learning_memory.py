"""What a learning step of a real model's block takes and keeps, in both precisions, with and without computing anew.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.learning_memory                     # Wan-1.3B, 4,096 tokens
    OMP_NUM_THREADS=1 python -m benchmarks.learning_memory --shape wan-14b --tokens 1024

One block with random weights learns by the recipe `attar` at W4A6, a process for each row. Seconds are process time:
of one forward of the block as it is, and of one optimizer step of one sample. "kept" is what the backward pass keeps,
every storage once, without rounded weights that a layer holds by itself; "peak" is by how much the memory of the
process grew over what it had before the first step.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attar.bench.subject import bench_blocks, latent_grid
from attar.candidates import in_every_layer
from attar.forecast.architecture import find_architecture
from attar.losses import mse
from attar.models.arithmetic import PRECISIONS, Arithmetic
from attar.models.block import BlockCall
from attar.quantize import recompute
from attar.quantize.block import quantize_block
from attar.recipe import load_recipe
from attar.settings import block_settings, plan_for

STEPS, TEXT_TOKENS = 3, 512


class _Enough(Exception):
    """Raised behind the last step that is measured."""


def measure(shape: str, tokens: int, precision: str, anew: bool) -> dict[str, Any]:
    """One row: seconds of a forward and of a step, bytes that are kept, and by which the process grew."""
    if not anew:
        recompute.LEAST = sys.maxsize
    architecture = find_architecture(shape)
    block = bench_blocks(architecture, latent_grid(architecture, tokens), TEXT_TOKENS, torch.float32)[0]
    recipe = in_every_layer(load_recipe("attar", {"quantize.weights": 4, "quantize.acts": 6}))
    plans = {p.name: p for p in plan_for(recipe, block.linears, []) if not p.skipped}
    settings = replace(block_settings(recipe), gptq_damping=None, clip_search=False)
    arithmetic = Arithmetic(precision, "cpu")
    module = copy.deepcopy(block.dense).requires_grad_(False)
    ends: list[float] = []
    kept: dict[int, int] = {}

    def run(call: BlockCall) -> dict[str, Tensor]:
        return arithmetic.run(module, call, block.outputs)

    def note(tensor: Tensor) -> Tensor:
        if not ends:  # of the first step
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def after(epoch: int, step: int, loss: float) -> None:
        ends.append(time.process_time())
        if len(ends) == STEPS:
            raise _Enough

    with torch.no_grad():
        target = run(block.call)
        start = time.process_time()
        run(block.call)
        forward = time.process_time() - start
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            quantize_block(
                module, plans, run, [block.call] * STEPS, [target] * STEPS, settings,
                loss=lambda prediction, wanted, _: mse(prediction, wanted), progress=after,
            )  # fmt: skip
    except _Enough:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    step = min(end - start for start, end in pairwise(ends))
    return {"forward": forward, "step": step, "kept": sum(kept.values()), "peak": 1024 * peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="wan-1.3b")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        precision, anew = given.row
        print(json.dumps(measure(given.shape, given.tokens, precision, anew == "anew")))
        return
    print(f"{given.shape}, {given.tokens} tokens, {torch.get_num_threads()} threads, process time")
    print(f"{'':26}{'forward s':>10}{'step s':>9}{'kept MB':>9}{'peak MB':>9}")
    for precision in PRECISIONS:
        for how in ("kept", "anew"):
            size = ("--shape", given.shape, "--tokens", str(given.tokens))
            command = [sys.executable, "-m", "benchmarks.learning_memory", *size, "--row", precision, how]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            title = f"{precision}, {'computed anew' if how == 'anew' else 'all kept'}"
            print(
                f"{title:26}{row['forward']:10.2f}{row['step']:9.2f}{row['kept'] / 1e6:9.0f}{row['peak'] / 1e6:9.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
