"""Calls of scaled-dot-product attention as they happen, and the order of streams in a joint sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attar.errors import AttarError
from attar.models.block import BlockCall, invoke


class AttentionCalls(TorchFunctionMode):
    """Hands every call of torch's scaled_dot_product_attention inside to `see(**arguments)`, then runs it.

    diffusers' native attention backend and its older attention processors all end in that function.
    """

    NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def __init__(self, see: Callable[..., None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.see(**dict(zip(self.NAMES, args, strict=False)), **kwargs)
        return func(*args, **kwargs)


def find_joint_order(block: nn.Module, call: BlockCall, attention: nn.Module) -> tuple[str, ...]:
    """The order of the streams in the query sequence of the block's joint attention.

    A query depends on its own token alone, so disturbing one stream changes the queries at its place and no
    others: one run of the block for each stream, beside an undisturbed one.
    Raises AttarError when the attention is not computed by scaled_dot_product_attention, or when the places
    found do not make up the sequence.
    """
    base = _queries(block, call, attention)
    starts: dict[str, int] = {}
    for name, stream in call.streams.items():
        noise = torch.randn(stream.shape, generator=torch.Generator().manual_seed(0)).to(stream)
        noise = noise * stream.std(-1, keepdim=True).clamp_min(
            1e-3
        )  # felt by each token, however large it is
        disturbed = call.with_streams({name: stream + noise})
        change = (_queries(block, disturbed, attention) - base).abs().amax(dim=(0, 2, 3))  # (L,)
        places = (change > 0.01 * change.max()).nonzero().flatten()
        if len(places) != stream.shape[1] or int(places[-1] - places[0]) + 1 != len(places):
            raise AttarError(
                f"cannot tell where {name} lies in the joint attention sequence", where=type(block).__name__
            )
        starts[name] = int(places[0])
    return tuple(sorted(starts, key=starts.__getitem__))


class _Stop(Exception):
    pass


def _queries(block: nn.Module, call: BlockCall, attention: nn.Module) -> Tensor:
    """The queries (B, L, H, d) that the attention forms in this call of the block; the rest is not run."""
    seen: list[Tensor] = []
    inside = [False]

    def enter(*_: Any) -> None:
        inside[0] = True

    def see(query: Tensor, **_: Any) -> None:
        if inside[0]:
            seen.append(query.detach().float().transpose(1, 2))
            raise _Stop

    handle = attention.register_forward_pre_hook(enter)
    try:
        with AttentionCalls(see):
            invoke(block, call)
    except _Stop:
        return seen[0]
    finally:
        handle.remove()
    raise native_backend_needed(type(attention).__name__)


def native_backend_needed(where: str) -> AttarError:
    return AttarError(
        "the attention is not computed by torch's scaled_dot_product_attention",
        where=where,
        fix='Call transformer.set_attention_backend("native") before; linear attention has no such weights',
    )
