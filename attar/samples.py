"""What calibration samples call the blocks of a model with: caught, put together, and kept until it is their turn."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.calibration.catch import catch_block_calls, each_catch
from attar.errors import AttarError
from attar.models.adapter import Block, ModelAdapter
from attar.models.block import BlockCall
from attar.models.tree import map_tensors
from attar.quantize.batching import concatenate_calls
from attar.workspace import Workspace

Calls = list[BlockCall]
Sample = list[dict[str, Any]]  # the calls of the model in one denoising step, one for each branch


def catch_samples(
    transformer: nn.Module, adapter: ModelAdapter, block: Block, samples: list[Sample]
) -> Calls:
    """The block's inputs for every sample, in float32 on the CPU.

    Guidance branches become one batch; where their shapes differ (texts of unequal length) each branch is a sample
    of its own. Constants that are equal in consecutive samples are held once.
    """
    flat = [call for branches in samples for call in branches]
    caught = iter(catch_block_calls(transformer, adapter, block.index, flat, store_device="cpu"))
    merged: Calls = []
    for branches in samples:
        _append(merged, one_batch([next(caught) for _ in branches]))
    return merged


class SegmentStarts:
    """The inputs of the first blocks of segments, caught from the model before any block of it is replaced.

    One forward of each sample gives those of all segments. The first one's are held in memory, all others wait on
    disk: a U-Net has as many segments as units. No other run reads what waits there; a job that goes on catches anew.
    """

    def __init__(
        self,
        transformer: nn.Module,
        adapter: ModelAdapter,
        heads: Sequence[Block],
        samples: list[Sample],
        workspace: Workspace,
        component: str,
    ) -> None:
        self.workspace, self.folder = workspace, f"{component}/waiting-{ranks.rank()}"
        self._held: dict[int, Calls] = {}
        self._waiting: dict[int, int] = {}  # block -> how many calls
        shutil.rmtree(workspace.folder / self.folder, ignore_errors=True)  # of a killed run
        if not samples or not heads:
            return
        first, *later = [block.index for block in heads]
        self._held[first] = []
        if not later:
            self._held[first] = catch_samples(transformer, adapter, heads[0], samples)
            return
        flat = [call for branches in samples for call in branches]
        caught = each_catch(transformer, adapter, [first, *later], flat, store_device="cpu")
        for branches in samples:
            found = [next(caught) for _ in branches]
            _append(self._held[first], one_batch([calls[first] for calls in found]))
            for index in later:
                for call in one_batch([calls[index] for calls in found]):
                    number = self._waiting.get(index, 0)
                    workspace.write_tensors(self._file(index, number), *call.flatten(), kept=False)
                    self._waiting[index] = number + 1

    def __contains__(self, index: int) -> bool:
        return index in self._held or index in self._waiting

    def take(self, index: int) -> Calls:
        """The inputs of that block in float32, in the order of the samples. They can be taken once."""
        if index in self._held:
            return self._held.pop(index)
        calls: Calls = []
        for number in range(self._waiting.pop(index)):
            file = self._file(index, number)
            stored = self.workspace.read_tensors(file)
            assert stored is not None
            _append(calls, [BlockCall.unflatten(*stored)])
            self.workspace.remove(file)
        return calls

    def end(self) -> None:
        """Removes what waits, also what a killed run of more processes has left. All processes have taken theirs."""
        if ranks.is_first():
            for folder in (self.workspace.folder / self.folder).parent.glob("waiting-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _file(self, index: int, number: int) -> str:
        return f"{self.folder}/{index:03d}-{number:04d}.safetensors"


def _append(calls: Calls, more: Calls) -> None:
    for call in more:
        call = call.to(dtype=torch.float32)
        calls.append(_sharing(call, calls[-1]) if calls else call)


def one_batch(branches: Calls) -> Calls:
    """Guidance branches as one call, or as they are where their shapes differ (texts of unequal length)."""
    if len(branches) == 1:
        return branches
    try:
        return [concatenate_calls(branches)]
    except AttarError:
        return branches


def _sharing(call: BlockCall, previous: BlockCall) -> BlockCall:
    """The call with those constants of the previous one that are equal to its own, so that they are held once."""
    known: list[Tensor] = []
    map_tensors(previous.constants, known.append)

    def held(tensor: Tensor) -> Tensor:
        alike = (
            k for k in known if (k.shape, k.dtype) == (tensor.shape, tensor.dtype) and torch.equal(k, tensor)
        )
        return next(alike, tensor)

    return BlockCall(call.streams, map_tensors(call.constants, held))
