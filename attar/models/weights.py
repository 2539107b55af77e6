"""Where a model's weights are while it is worked on: all in memory, or in files, with one unit of them open at a time.

Whoever works on a block asks `weights_of(model)` to open it and does not care which of the two it is. A model whose
weights are streamed also runs as a whole: a hook before each unit opens it, and closes the one that was open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attar.models.shards import Shards

Replaced = Callable[[], Mapping[str, Tensor]]


class Weights(Protocol):
    """What the compression asks of a model's weights."""

    device: torch.device

    @contextmanager
    def opened(self, module: nn.Module) -> Iterator[None]:
        """Inside, the tensors of a block are in memory."""
        ...

    def replaced(self, module: nn.Module, stored: Replaced) -> None:
        """Layers of the block were replaced. stored: reads their tensors, by their names in the block."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with its name, one at a time."""
        ...


class ResidentWeights:
    """The weights of a model that is in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        first = next(model.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device

    @contextmanager
    def opened(self, module: nn.Module) -> Iterator[None]:
        yield

    def replaced(self, module: nn.Module, stored: Replaced) -> None:
        """Fills layers that were put there empty; those that were made here have their values."""
        if any(tensor.is_meta for tensor in module.state_dict().values()):
            fill(module, stored().get, self.device)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()


class StoredWeights(ResidentWeights):
    """The weights of a model that is not run: they stay in its files."""

    def __init__(self, model: nn.Module, shards: Shards) -> None:
        super().__init__(model)
        self.shards = shards
        model.attar_weights = self  # type: ignore[assignment]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.shards:
            yield name, self.shards.read(name)


class Turn:
    """Which unit is open, among all models that share a memory."""

    def __init__(self) -> None:
        self.weights: StreamedWeights | None = None
        self.name: str | None = None

    def take(self, weights: StreamedWeights, name: str) -> bool:
        """Closes what is open, unless it is this one already; then False."""
        if self.weights is weights and self.name == name:
            return False
        self.end()
        self.weights, self.name = weights, name
        return True

    def end(self) -> None:
        """Closes what is open."""
        if self.weights is not None and self.name is not None:
            self.weights.close(self.name)
        self.weights = self.name = None


class StreamedWeights:
    """The weights of a model on the meta device, whose stored tensors are in `shards`.

    units: dotted names of the parts that are opened one at a time; all other tensors are read now and stay. The
    types of the parameters on the meta device are those that the tensors get. Each tensor of the state dict must be
    in the shards, if not under its own name then under that of a parameter that is tied to it.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[str], shards: Shards, device: torch.device, turn: Turn
    ) -> None:
        self.model, self.shards, self.device, self.turn = model, shards, device, turn
        self.units = {name: model.get_submodule(name) for name in units}
        self._names = {id(module): name for name, module in self.units.items()}
        self._stored: dict[str, Replaced] = {}
        self._aliases = tied_names(model, shards)
        inside = tuple(f"{name}." for name in units)
        fill(model, lambda key: None if key.startswith(inside) else self._read(key), device)
        for name, module in self.units.items():
            empty(module)  # buffers have values from the start, which are not those of the files
            for (
                part
            ) in module.modules():  # a model may run a part of a block by itself, as the head of DiT does
                if part is module or next(part.children(), None) is not None:
                    self._names[id(part)] = name
                    part.register_forward_pre_hook(self._enter)
        _move_buffers(model, device)  # such as rotary tables, which are in no file
        model.attar_weights = self  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedWeights:
        return self  # a copy of an open block keeps its tensors, and these hooks do not know it

    @contextmanager
    def opened(self, module: nn.Module) -> Iterator[None]:
        self.open(self._names[id(module)])
        yield

    def replaced(self, module: nn.Module, stored: Replaced) -> None:
        name = self._names[id(module)]
        self._stored[name] = stored
        if self.turn.weights is self and self.turn.name == name:
            self.turn.end()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, _ in self.model.named_parameters():
            yield name, self.shards.read(self._aliases.get(name, name))

    def open(self, name: str) -> None:
        """Reads the tensors of a unit; the one that was open is closed first."""
        if not self.turn.take(self, name):
            return
        new = self._stored[name]() if name in self._stored else {}
        key = f"{name}.{{}}".format
        fill(self.units[name], lambda path: new[path] if path in new else self._read(key(path)), self.device)

    def close(self, name: str) -> None:
        """Lets the tensors of a unit go."""
        empty(self.units[name])

    def _enter(self, module: nn.Module, args: tuple) -> None:
        name = self._names.get(id(module))
        if name is not None:
            self.open(name)

    def _read(self, key: str) -> Tensor:
        return self.shards.read(self._aliases.get(key, key))


def weights_of(model: nn.Module) -> Weights:
    """Where the model's weights are."""
    found = getattr(model, "attar_weights", None)
    return ResidentWeights(model) if found is None else found


def tied_names(model: nn.Module, shards: Shards) -> dict[str, str]:
    """Name of a tensor that is not stored -> name of a stored one that is the same parameter."""
    state = model.state_dict(keep_vars=True)
    known = {id(tensor): name for name, tensor in state.items() if name in shards}
    return {
        name: known[id(tensor)]
        for name, tensor in state.items()
        if name not in shards and id(tensor) in known
    }


def fill(module: nn.Module, tensor: Callable[[str], Tensor | None], device: torch.device) -> None:
    """Gives the module the tensors of its state dict; None leaves one as it is. Floating point is cast to the type
    that the module has there."""
    for path, old in module.state_dict(keep_vars=True).items():
        new = tensor(path)
        if new is not None:
            _put(
                module, path, new.to(device=device, dtype=old.dtype if old.is_floating_point() else None), old
            )


def empty(module: nn.Module) -> None:
    """Puts all tensors of the module's state dict on the meta device."""
    for path, old in module.state_dict(keep_vars=True).items():
        if not old.is_meta:
            _put(module, path, old.detach().to("meta"), old)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Brings every buffer that has values to the device."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.to(device)


def _put(module: nn.Module, path: str, tensor: Tensor, old: Tensor) -> None:
    parent, _, leaf = path.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        owner._buffers[leaf] = tensor
