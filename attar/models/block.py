"""One call of one transformer block, with its arguments by name: caught, moved, stored, and run again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.models.tree import flatten, map_tensors, unflatten

Signature = inspect.Signature


@dataclass
class BlockCall:
    """Everything that one transformer block is called with, by parameter name.

    streams: the tensors carried from block to block, e.g. {"hidden_states": (B, N, C)}; models with joint
        attention also have "encoder_hidden_states" (B, T, C).
    constants: all other arguments (modulation, rotary tables, masks, text of a cross-attention, flags). A
    block
        that takes `*args` has them as a tuple under that parameter's name, `**kwargs` likewise as a dict.
    group: the group of denoising steps that the call is of, where bits are by groups.
    """

    streams: dict[str, Tensor]
    constants: dict[str, Any] = field(default_factory=dict)
    group: int | None = None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BlockCall:
        """A call with all tensors on `device`, and all floating-point tensors in `dtype`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return BlockCall(map_tensors(self.streams, move), map_tensors(self.constants, move), self.group)

    def with_streams(self, streams: Mapping[str, Tensor]) -> BlockCall:
        """The call of the next block of the same segment: other streams, the same constants."""
        return BlockCall({**self.streams, **streams}, self.constants, self.group)

    def flatten(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, meta): a flat dict fit for safetensors and a JSON-able description of the rest.

        A tensor that stands in several places is stored once. Tensors come out contiguous.
        Raises AttarError for an argument that is neither tensor nor plain value.
        """
        tensors: dict[str, Tensor] = {}
        keys: dict[int, str] = {}

        def put(path: str, tensor: Tensor) -> str:
            if id(tensor) not in keys:
                keys[id(tensor)] = path
                tensors[path] = tensor.detach().contiguous()
            return keys[id(tensor)]

        meta = {name: flatten(getattr(self, name), name, put) for name in ("streams", "constants")}
        meta |= {} if self.group is None else {"group": self.group}
        return tensors, meta

    @classmethod
    def unflatten(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> BlockCall:
        """The call that `flatten` took apart."""
        streams, constants = (unflatten(meta[k], tensors.__getitem__) for k in ("streams", "constants"))
        return cls(streams, constants, meta.get("group"))


def signature_of(module: nn.Module) -> Signature:
    """The signature of the module's forward, without `self`."""
    return inspect.signature(module.forward)


def bind(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module`, by parameter name; empty `*args` and `**kwargs` are left out."""
    signature = signature_of(module)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {k: v for k, v in arguments.items() if signature.parameters[k].kind not in variadic or v}


def as_outputs(result: Any) -> tuple[Any, ...]:
    """The outputs of a block as a tuple, also when it returns a single tensor."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def invoke(block: nn.Module, call: BlockCall) -> tuple[Any, ...]:
    """Calls the block and returns its outputs as they come. AttarError for an argument it does not take."""
    signature = signature_of(block)
    bound = signature.bind_partial()
    given = {**call.streams, **call.constants}
    unknown = [name for name in given if name not in signature.parameters]
    if unknown:
        raise AttarError(
            f"the block has no argument {unknown[0]!r}",
            where=type(block).__name__,
            fix="Catch the calls of this block again: its segment starts here",
        )
    # positional arguments are read in the order of the signature
    bound.arguments.update({name: given[name] for name in signature.parameters if name in given})
    return as_outputs(block(*bound.args, **bound.kwargs))


def run_block(block: nn.Module, call: BlockCall, outputs: tuple[str | None, ...]) -> dict[str, Tensor]:
    """Calls the block and returns the streams after it, by name.

    `outputs` names the k-th output of the block (`Block.outputs` of the adapter); an output named None, or
    one that the block returns as None, is left out. Raises AttarError if the block gives another number of
    outputs.
    """
    results = invoke(block, call)
    if len(results) != len(outputs):
        raise AttarError(f"{len(results)} outputs for {len(outputs)} names", where=type(block).__name__)
    named = zip(outputs, results, strict=True)
    return {name: value for name, value in named if name is not None and value is not None}
