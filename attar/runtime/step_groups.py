"""Groups of denoising steps: layers whose activations have other bits or clipping in each, chosen by the timestep."""

from __future__ import annotations

import inspect
import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.runtime.formats import check_format

ARGUMENT = "timestep"  # of a model's forward
_ATTRIBUTE = "attar_step_groups"
_CHECKPOINTING = "_gradient_checkpointing_func"  # of diffusers' models and their blocks


@dataclass(frozen=True)
class StepGroups:
    """Which group of a trajectory a timestep belongs to. Groups are counted from 0, the noisiest.

    thresholds: between neighbouring groups, in the order of the steps, as the model is given timesteps. descending:
    whether timesteps fall from step to step; some models are given rising ones.
    Raises AttarError for no thresholds, and for thresholds that are not finite or not in this order.
    """

    thresholds: tuple[float, ...]
    descending: bool

    def __post_init__(self) -> None:
        ordered = all((a > b) if self.descending else (a < b) for a, b in pairwise(self.thresholds))
        if not self.thresholds or not all(map(math.isfinite, self.thresholds)) or not ordered:
            raise AttarError(f"{list(self.thresholds)} are no thresholds between groups of steps")

    @classmethod
    def of_trajectory(cls, timesteps: Sequence[float], count: int) -> StepGroups:
        """`count` groups of equally many steps, one more in some where that does not come out even.

        timesteps: of all steps, as the model was given them. Thresholds lie halfway between two steps, so trajectories
        of other lengths are cut at the same noise. Raises AttarError for fewer steps than groups, and for timesteps
        that do not go one way.
        """
        steps = len(timesteps)
        if steps < count:
            raise AttarError(
                f"{steps} steps cannot be cut into {count} groups",
                where="quantize.step_groups",
                fix="Trace more steps, or choose fewer groups",
            )
        descending = timesteps[-1] < timesteps[0]
        borders = [k * steps // count for k in range(1, count)]
        onward = all((a >= b) if descending else (a <= b) for a, b in pairwise(timesteps))
        if not onward or any(timesteps[k - 1] == timesteps[k] for k in borders):
            raise AttarError(
                "the scheduler's timesteps do not tell groups of steps apart",
                where="quantize.step_groups",
                fix="Set it to 1, or use a scheduler whose timesteps only fall, or only rise",
            )
        return cls(tuple((timesteps[k - 1] + timesteps[k]) / 2 for k in borders), descending)

    @property
    def count(self) -> int:
        return len(self.thresholds) + 1

    def group(self, timestep: Any) -> int:
        """Of a call of the model. timestep: a number, or a tensor of any shape.

        Raises AttarError where there is none, where it is not finite, and where a batch has those of several groups.
        """
        if timestep is None:
            raise AttarError(
                "the model is called without a timestep, by which its group of steps is found",
                where=ARGUMENT,
                fix="Give it the timestep of the step",
            )
        if isinstance(timestep, Tensor):
            values = timestep.detach().double().flatten().unique().tolist()
        else:
            values = [float(timestep)]
        if not values or not all(map(math.isfinite, values)):
            raise AttarError(f"{timestep!r} is no timestep", where=ARGUMENT)
        groups = {self._of(value) for value in values}
        if len(groups) > 1:
            raise AttarError(
                f"the timesteps from {min(values):g} to {max(values):g} of one batch lie in several groups of steps",
                where=ARGUMENT,
                fix="Call the model once for each group",
            )
        return groups.pop()

    def _of(self, value: float) -> int:
        sign = -1.0 if self.descending else 1.0
        return bisect_left([sign * threshold for threshold in self.thresholds], sign * value)

    def config(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {"thresholds": list(self.thresholds), "descending": self.descending}

    @classmethod
    def from_config(cls, config: Any) -> StepGroups:
        """Raises AttarError for anything that `config` does not give."""
        fields = {"thresholds": list, "descending": bool}
        fits = isinstance(config, Mapping) and config.keys() == fields.keys()
        if not fits or any(type(config[key]) is not kind for key, kind in fields.items()):
            raise AttarError(f"{config!r} does not describe groups of steps")
        if not all(type(value) in (int, float) for value in config["thresholds"]):
            raise AttarError(f"{config['thresholds']!r} are no thresholds between groups of steps")
        try:
            return cls(tuple(map(float, config["thresholds"])), config["descending"])
        except OverflowError:  # of an integer
            raise AttarError("a threshold between groups of steps is too large") from None


class _Call(threading.local):
    """The group of the call of a model that this thread is in; None outside of one.

    Of the thread and not of the layers, which several threads may be in at once. Compiled code guards on it.
    """

    group: int | None = None


_CALL = _Call()


class GroupedActs:
    """A layer whose activations may have other bits, or other clipping factors, in each group of steps.

    act_bits: of all groups, or those of the widest; None for floating point. act_groups: of each, where they differ.
    clip_groups: how many groups have clipping factors of their own; None where all share a pair.
    step_group: the group that the layer computes for outside of the model's calls, see `choose_group`.
    """

    act_bits: int | None
    act_groups: tuple[int, ...] | None = None
    clip_groups: int | None = None
    step_group: int | None = None

    @property
    def group_count(self) -> int | None:
        """How many groups of steps the layer tells apart, None for one that asks for no group."""
        return self.clip_groups if self.act_groups is None else len(self.act_groups)

    def acts_now(self, clip: Tensor | None) -> tuple[int | None, Tensor | None]:
        """(bits, clipping factors (2,)) of the current group. clip: those of all groups, (2,) or (groups, 2).

        Raises AttarError where they depend on a group that nobody has chosen.
        """
        if self.act_groups is None and self.clip_groups is None:
            return self.act_bits, clip
        group = self.step_group if _CALL.group is None else _CALL.group
        if group is None:
            what = "bits" if self.act_groups is not None else "clipping"
            raise AttarError(
                f"the layer has other activation {what} in each group of steps, and the step is not known",
                fix="Call the whole model, which knows it by its timestep, or name the group with choose_group",
            )
        bits = self.act_bits if self.act_groups is None else self.act_groups[group]
        return bits, clip if clip is None or self.clip_groups is None else clip[group]


def check_act_groups(groups: Sequence[Any], act_bits: int | None, act_format: str) -> tuple[int, ...]:
    """Bits of each group of a layer whose widest are `act_bits`. AttarError where they cannot be."""
    if len(groups) < 2 or any(type(bits) is not int for bits in groups):
        raise AttarError(f"{list(groups)!r} are no activation bits of groups of steps")
    for bits in groups:
        check_format(act_format, bits)
        if not 2 <= bits <= 8:
            raise AttarError(f"cannot run {bits}-bit activations", fix="Choose between 2 and 8 bits")
    if max(groups) != act_bits or min(groups) == act_bits:
        raise AttarError(f"{list(groups)} are not different bits of at most {act_bits}")
    return tuple(groups)


def check_clip_groups(groups: Any, clipped: bool, act_groups: Sequence[int] | None) -> int:
    """How many groups of steps have clipping factors of their own. AttarError where they cannot.

    clipped: whether the layer has such factors at all. act_groups: its bits by groups, if it has these.
    """
    if type(groups) is not int or groups < 2:
        raise AttarError(f"{groups!r} is no number of groups of steps with clipping of their own")
    if not clipped:
        raise AttarError("clipping by groups of steps needs activation clipping", fix="Set act_clip")
    if act_groups is not None and len(act_groups) != groups:
        raise AttarError(f"bits of {len(act_groups)} groups of steps do not fit clipping of {groups}")
    return groups


def choose_group(module: nn.Module, group: int) -> None:
    """All layers in `module` that tell groups apart compute for this one from now on, but in calls of a whole model.

    In every thread. Raises AttarError for a group that there is not.
    """
    _CALL.group = None  # a compiled call that failed has left it
    for layer in module.modules():
        if isinstance(layer, GroupedActs) and layer.group_count is not None:
            if not 0 <= group < layer.group_count:
                raise AttarError(f"there is no group {group} of {layer.group_count} groups of steps")
            layer.step_group = group


def check_takes_timestep(model: nn.Module) -> None:
    """Raises AttarError for a model whose forward has no argument `timestep`."""
    if ARGUMENT not in inspect.signature(type(model).forward).parameters:
        raise AttarError(
            f"the model's forward has no {ARGUMENT}, so groups of steps cannot be told apart",
            where=type(model).__name__,
            fix="Set quantize.step_groups to 1",
        )


def follow_steps(model: nn.Module, groups: StepGroups) -> None:
    """From now on every call of the model computes for the group of its timestep, in its own thread alone. In place.

    So do the blocks that its gradient checkpointing recomputes. Outside of a call nothing is chosen: blocks that are
    called apart need `choose_group`. Reading a timestep that lies on a GPU waits for it, once a call.
    Raises AttarError for a model whose forward has no argument `timestep`.
    """
    check_takes_timestep(model)
    if step_groups_of(model) is None:
        begin: Any = _begin
        end: Any = _end
        model.register_forward_pre_hook(begin, with_kwargs=True)
        model.register_forward_hook(end, always_call=True)
    object.__setattr__(model, _ATTRIBUTE, groups)


def step_groups_of(model: nn.Module) -> StepGroups | None:
    """The groups that the model follows, if it does."""
    return model.__dict__.get(_ATTRIBUTE)


@torch.compiler.disable
def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    groups = step_groups_of(model)
    assert groups is not None
    timestep = kwargs.get(ARGUMENT)
    if timestep is None:
        place = list(inspect.signature(type(model).forward).parameters).index(ARGUMENT) - 1  # without self
        timestep = args[place] if place < len(args) else None
    group = groups.group(timestep)
    if torch.is_grad_enabled():
        _keep_in_recompute(model)
    _CALL.group = group


@torch.compiler.disable
def _end(*_: Any) -> None:
    _CALL.group = None


def _keep_in_recompute(model: nn.Module) -> None:
    """Checkpointing may have been enabled, or given another function, since the last call."""
    for module in model.modules():
        function = module.__dict__.get(_CHECKPOINTING)
        if function is not None and not isinstance(function, _Checkpointing):
            setattr(module, _CHECKPOINTING, _Checkpointing(function))


class _Checkpointing:
    """diffusers' function (module, *args) for checkpointing, with the forward's group in the recompute.

    That runs when the call is over, perhaps after one of another group, and on a GPU in another thread.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        group = _CALL.group
        if group is not None and not torch.compiler.is_compiling():  # which recomputes what it has traced
            module = _InGroup(module, group)
        return self.function(module, *args, **kwargs)


class _InGroup:
    """A block that computes for one group wherever it is called."""

    def __init__(self, block: Callable[..., Any], group: int) -> None:
        self.block, self.group = block, group

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, _CALL.group = _CALL.group, self.group
        try:
            return self.block(*args, **kwargs)
        finally:
            _CALL.group = before
