"""What calibration samples call the blocks of a model with: caught, put together, and kept until it is their turn."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.calibration.catch import each_catch
from attar.calibration.store import TraceStore
from attar.errors import AttarError
from attar.models.adapter import Block, ModelAdapter
from attar.models.block import BlockCall
from attar.models.tree import map_tensors, tensors_of
from attar.quantize.batching import concatenate_calls
from attar.runtime.step_groups import ARGUMENT, StepGroups
from attar.workspace import Workspace

Calls = list[BlockCall]
Hold = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
Sample = list[dict[str, Any]]  # the calls of the model in one denoising step, one for each branch


def traced_groups(
    store: TraceStore, component: str, prompts: int, count: int
) -> tuple[StepGroups, list[int]]:
    """`count` groups of the traced steps in which a component runs, and how many steps each has.

    prompts: how many were traced, all with the same timesteps. Raises AttarError where these cannot be told apart.
    """
    for prompt in range(prompts):
        steps = store.steps_of(component, prompt)
        if steps:
            break
    else:
        raise AttarError("the component did not run in any traced step", where=component)
    try:
        times = [_timestep(store.calls(component, prompt, step)[0]) for step in steps]
        groups = StepGroups.of_trajectory(times, count)
    except AttarError as error:
        raise AttarError(error.what, where=f"{component}: {error.where}", fix=error.fix) from error
    found = [groups.group(time) for time in times]
    return groups, [found.count(group) for group in range(count)]


def _timestep(call: dict[str, Any]) -> float:
    """What a call of the model was given."""
    given = call.get(ARGUMENT)
    values: list[Any] = given.double().unique().tolist() if isinstance(given, Tensor) else [given]
    if len(values) != 1 or not isinstance(values[0], (int, float)):
        raise AttarError(
            "the model is not called with one timestep for a whole step, so groups of steps cannot be told apart",
            where="quantize.step_groups",
            fix="Set it to 1",
        )
    return float(values[0])


def catch_samples(
    transformer: nn.Module,
    adapter: ModelAdapter,
    block: Block,
    samples: list[Sample],
    groups: StepGroups | None = None,
    hold: Hold = dict,
) -> Calls:
    """The block's inputs for every sample, in float32 on the CPU. hold: keeps its streams there.

    Guidance branches become one batch; where their shapes differ (texts of unequal length) each branch is a sample
    of its own. Constants that are equal in consecutive samples are held once. groups: of steps, one of which each call
    is of then.
    """
    flat = [call for branches in samples for call in branches]
    caught = each_catch(transformer, adapter, [block.index], flat, store_device="cpu")
    merged: Calls = []
    for branches in samples:
        calls = [next(caught)[block.index] for _ in branches]
        _append(merged, one_batch(calls), group_of(branches, groups), hold)
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
        groups: StepGroups | None = None,
    ) -> None:
        """groups: as `catch_samples`."""
        self.workspace, self.folder = workspace, f"{component}/waiting-{ranks.rank()}"
        self._held: dict[int, Calls] = {}
        self._waiting: dict[int, int] = {}  # block -> how many calls
        shutil.rmtree(workspace.folder / self.folder, ignore_errors=True)  # of a killed run
        if not samples or not heads:
            return
        first, *later = [block.index for block in heads]
        self._held[first] = []
        if not later:
            self._held[first] = catch_samples(transformer, adapter, heads[0], samples, groups, workspace.hold)
            return
        flat = [call for branches in samples for call in branches]
        caught = each_catch(transformer, adapter, [first, *later], flat, store_device="cpu")
        for branches in samples:
            found, group = [next(caught) for _ in branches], group_of(branches, groups)
            _append(self._held[first], one_batch([calls[first] for calls in found]), group, workspace.hold)
            for index in later:
                for call in one_batch([calls[index] for calls in found]):
                    number = self._waiting.get(index, 0)
                    tensors = replace(call, group=group).flatten()
                    workspace.write_tensors(self._file(index, number), *tensors, kept=False)
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
            call = BlockCall.unflatten(*stored)
            _append(calls, [call], call.group, self.workspace.hold)
            self.workspace.remove(file)
        return calls

    def end(self) -> None:
        """Removes what waits, also what a killed run of more processes has left. All processes have taken theirs."""
        if ranks.is_first():
            for folder in (self.workspace.folder / self.folder).parent.glob("waiting-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _file(self, index: int, number: int) -> str:
        return f"{self.folder}/{index:03d}-{number:04d}.safetensors"


def group_of(branches: Sample, groups: StepGroups | None) -> int | None:
    """The group of steps of a sample, None without groups."""
    return None if groups is None else groups.group(branches[0].get(ARGUMENT))


def _append(calls: Calls, more: Calls, group: int | None, hold: Hold) -> None:
    for call in more:
        call = replace(call.to(dtype=torch.float32), group=group)
        call = call.with_streams(hold(call.streams))
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
    known = tensors_of(previous.constants)

    def held(tensor: Tensor) -> Tensor:
        alike = (
            k for k in known if (k.shape, k.dtype) == (tensor.shape, tensor.dtype) and torch.equal(k, tensor)
        )
        return next(alike, tensor)

    return replace(call, constants=map_tensors(call.constants, held))
