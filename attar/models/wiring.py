"""How the blocks of a transformer are wired together, derived by watching one forward.

The outputs of one block are the very tensor objects that the next block receives. So one forward with a hook
before and after every block tells which output of block k is which argument of block k+1, whatever the order
in which a family returns its streams (Flux: encoder_hidden_states first; CogVideoX and HunyuanVideo: last).

Two neighbouring blocks belong to one *segment* when every stream goes on under the same name, and every other
argument of the second is also given, as the same object, to the first. Inside a segment the call of the next
block is the call of this one with its streams replaced. Where that does not hold (renamed arguments, streams
concatenated in between, arguments made anew for each block) a new segment starts, and its calls must be
caught again from the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.models.block import as_outputs, bind

Names = tuple["str | None", ...]
Shape = Any  # (shape, dtype) of a tensor, None for anything else


@dataclass
class Wiring:
    """What one forward tells.

    order: the blocks as they ran, as places in the list given; the rest is in that order:
    outputs[k]: names of the outputs of block k; streams[k]: names of the arguments carried into it;
    segments: runs of consecutive indices; first_calls: the arguments of the first block of each class.
    """

    order: list[int] = field(default_factory=list)
    outputs: list[Names] = field(default_factory=list)
    streams: list[tuple[str, ...]] = field(default_factory=list)
    segments: list[list[int]] = field(default_factory=list)
    first_calls: dict[type, dict[str, Any]] = field(default_factory=dict)


class _Watcher:
    """Hooks of one forward. Holds one block's tensors at a time, since models are deep and videos long."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.classes: list[type] = []
        self.shapes: list[tuple[dict[str, Shape], list[Shape]]] = []  # of arguments and of outputs
        self.carried: list[Names] = []
        self.joined: list[bool] = []
        self.first_calls: dict[type, dict[str, Any]] = {}
        self.call: dict[str, Any] = {}
        self.results: tuple[Any, ...] = ()

    def before(self, index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            call = bind(module, args, kwargs)
            if self.order:
                # the last block's outputs are still held, so that identity means something
                self.carried.append(_carried(self.results, call))
                self.joined.append(_joined(self.results, self.carried[-1], self.call, call))
            self.order.append(index)
            self.classes.append(type(module))
            self.first_calls.setdefault(type(module), call)
            self.call = call

        return hook

    def after(self, module: nn.Module, args: tuple, result: Any) -> None:
        self.results = as_outputs(result)
        self.shapes.append(({n: _shape(v) for n, v in self.call.items()}, [_shape(r) for r in self.results]))


def watch(transformer: nn.Module, blocks: Sequence[nn.Module], call: Mapping[str, Any]) -> Wiring:
    """Runs the transformer once without gradient and derives its wiring.

    Raises AttarError when a block does not run exactly once, or when its outputs cannot be told apart.
    """
    watcher = _Watcher()
    handles = []
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(watcher.before(index), with_kwargs=True))
        handles.append(block.register_forward_hook(watcher.after))
    try:
        with torch.no_grad():
            transformer(**call)
    finally:
        for handle in handles:
            handle.remove()
    for index, block in enumerate(blocks):
        if (times := watcher.order.count(index)) != 1:
            raise AttarError(
                f"block {index} ran {times} times in one forward of the transformer, not once",
                where=type(block).__name__,
            )
    return _wire(watcher)


def _wire(seen: _Watcher) -> Wiring:
    wiring = Wiring(order=seen.order, first_calls=seen.first_calls)
    by_class: dict[type, Names] = {}
    for cls, names, joined in zip(seen.classes, seen.carried, seen.joined, strict=False):
        if joined:
            by_class.setdefault(cls, names)
    for k, cls in enumerate(seen.classes):
        if k < len(seen.joined) and seen.joined[k]:
            names = seen.carried[k]
        else:  # nothing takes over its outputs as they are: named as in the other blocks of its class
            names = by_class.get(cls) or _by_shape(cls, *seen.shapes[k])
        wiring.outputs.append(names)
        starts = k == 0 or not seen.joined[k - 1]
        wiring.streams.append(tuple(n for n in (names if starts else seen.carried[k - 1]) if n is not None))
        if starts:
            wiring.segments.append([])
        wiring.segments[-1].append(k)
    return wiring


def _carried(outputs: tuple[Any, ...], following: Mapping[str, Any]) -> Names:
    """For each output the name of the argument of the following block that is the same object."""
    return tuple(
        next((n for n, v in following.items() if isinstance(o, Tensor) and v is o), None) for o in outputs
    )


def _joined(outputs: tuple, names: Names, call: Mapping[str, Any], following: Mapping[str, Any]) -> bool:
    if any(name is None for name, output in zip(names, outputs, strict=True) if output is not None):
        return False
    streams = {name for name in names if name is not None}
    rest, rest_following = call.keys() - streams, following.keys() - streams
    return (
        bool(streams)
        and streams <= call.keys()
        and rest == rest_following
        and all(_same(call[name], following[name]) for name in rest)
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are the same tensors in memory, or equal plain values."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b


def _shape(value: Any) -> Shape:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None


def _by_shape(cls: type, arguments: Mapping[str, Shape], outputs: Sequence[Shape]) -> Names:
    """Names for the outputs of the only block of its class: the arguments of the same shape and type.

    A block with one output continues its first argument, also if others happen to have that shape, or if none has,
    as where a U-Net changes its width or resolution.
    """
    names: list[str | None] = []
    for output in outputs:
        fits = [name for name, shape in arguments.items() if shape == output] if output is not None else []
        if output is not None and len(outputs) == 1 and not fits:
            fits = [name for name, shape in arguments.items() if shape is not None]
        if output is not None and len(fits) != 1 and not (len(outputs) == 1 and fits):
            raise AttarError(
                f"cannot tell which argument its outputs continue (candidates: {', '.join(fits) or 'none'})",
                where=cls.__name__,
            )
        names.append(fits[0] if fits else None)
    return tuple(names)
