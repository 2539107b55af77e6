"""How much attention each token receives: column sums of the softmax, without ever holding the attention map.

S_j = sum over heads h and queries i of A[h, i, j], with A the post-softmax attention of the full-precision
block (S2Q-VDiT, attention-guided token weighting). So the S of one sample add up to heads x queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.models.adapter import Block, ModelAdapter
from attar.models.block import bind
from attar.models.joint import AttentionCalls, native_backend_needed
from attar.models.tree import tokens_of


class AttentionMass:
    """What `attention_mass` measured."""

    def __init__(self, order: tuple[str, ...], where: str, budget: int) -> None:
        self.order, self.where, self.budget = order, where, budget
        self._lengths: dict[str, int] = {}
        self._batch = 0
        self._mass: dict[str, Tensor] = {}
        self._running: list[
            int
        ] = []  # calls of scaled_dot_product_attention seen by each open attention module

    def per_stream(self) -> dict[str, Tensor]:
        """S of the last run of the block: {stream: (B, tokens of the stream) float32}, summed over heads,
        queries and all self or joint attentions of the block. {} for a block that has neither."""
        return dict(self._mass)

    def _enter_block(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = bind(module, args, kwargs)
        self._lengths = {name: tokens_of(given[name]).shape[1] for name in self.order}
        self._batch = given[self.order[0]].shape[0]
        self._mass = {}

    def _enter_attention(self, *_: Any) -> None:
        self._running.append(0)

    def _leave_attention(self, module: nn.Module, *_: Any) -> None:
        if self._running.pop() == 0:
            raise native_backend_needed(f"{self.where}, {type(module).__name__}")

    def _see(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if not self._running:
            return  # a cross-attention
        self._running[-1] += 1
        if query.ndim != 4 or query.shape[0] != self._batch:
            raise AttarError(
                f"attention runs on {tuple(query.shape)}, not on the whole batch of {self._batch} at once",
                where=self.where,
                fix="Use a batch of one",
            )
        streams = self._streams_of(key.shape[-2])
        with torch.autocast(query.device.type, enabled=False):
            mass = column_mass(query, key, attn_mask, is_causal, scale, self.budget)
        for name, part in zip(streams, mass.split([self._lengths[n] for n in streams], dim=1), strict=True):
            self._mass[name] = self._mass[name] + part if name in self._mass else part

    def _streams_of(self, length: int) -> tuple[str, ...]:
        """The streams that make up a sequence of that length: all of the joint order, or one alone."""
        if sum(self._lengths.values()) == length:
            return self.order
        alone = [name for name in self.order if self._lengths[name] == length]
        if len(alone) != 1:
            sizes = ", ".join(f"{name} {n}" for name, n in self._lengths.items())
            raise AttarError(f"an attention over {length} tokens fits no stream ({sizes})", where=self.where)
        return (alone[0],)


@contextmanager
def attention_mass(adapter: ModelAdapter, block: Block, budget: int = 64 << 20) -> Iterator[AttentionMass]:
    """Measures the attention that each token receives while the block runs inside.

        with attention_mass(adapter, block) as mass:
            run_block(block.module, call, block.outputs)
        mass.per_stream()  # {"hidden_states": (B, N), ...} float32

    Query and key are taken as they enter scaled_dot_product_attention, after normalisation and rotary
    embedding; the softmax is computed in float32, over chunks of queries whose scores take at most `budget`
    bytes. Padded (masked) keys receive nothing. Only self- and joint attention count.
    Raises AttarError if the adapter has not observed the model, if an attention does not go through torch's
    scaled_dot_product_attention, or if its sequence is not made of the block's streams.
    """
    counted = [a.module for a in adapter.attentions(block) if a.kind in ("self", "joint")]
    mass = AttentionMass(adapter.joint_order(block), block.name, budget)
    handles = [block.module.register_forward_pre_hook(mass._enter_block, with_kwargs=True)]
    for attention in counted:
        handles.append(attention.register_forward_pre_hook(mass._enter_attention))
        handles.append(attention.register_forward_hook(mass._leave_attention))
    try:
        with AttentionCalls(mass._see):
            yield mass
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def column_mass(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    budget: int = 64 << 20,
) -> Tensor:
    """Column sums of softmax(query keyᵀ * scale + mask), over heads and queries: (B, keys) float32.

    query (B, H, Lq, d); key (B, H or a divisor of H, Lk, d) (grouped heads); mask as torch takes it,
    broadcastable to (B, H, Lq, Lk): boolean (True = take part) or additive. A query that may look at nothing
    gives nothing. Scores are formed for as many queries at a time as fit into `budget` bytes, at least one.
    """
    b, heads, queries, d = query.shape
    groups, keys = key.shape[1], key.shape[2]
    # (B, H, L, d) -> (B, groups, heads per group, L, d), so that grouped keys need no copies
    query = query.unflatten(1, (groups, heads // groups))
    key = key.float().unsqueeze(2).transpose(-1, -2)  # (B, G, 1, d, Lk)
    if mask is not None:
        mask = mask.expand(b, heads, queries, keys).unflatten(1, (groups, heads // groups))
    if causal:
        columns = torch.arange(keys, device=key.device)
    total = torch.zeros(b, keys, dtype=torch.float32, device=key.device)
    rows = max(1, budget // (4 * b * heads * keys))
    for start in range(0, queries, rows):
        part = query[..., start : start + rows, :].float() * (d**-0.5 if scale is None else scale)
        scores = part @ key  # (B, G, H/G, rows, Lk)
        if mask is not None:
            piece = mask[..., start : start + rows, :]
            scores = (
                scores.masked_fill_(~piece, -torch.inf) if piece.dtype == torch.bool else scores.add_(piece)
            )
        if causal:
            own = torch.arange(start, start + scores.shape[-2], device=key.device)
            scores.masked_fill_(columns > own[:, None], -torch.inf)
        # softmax in place: one buffer of scores is all that is ever held
        highest = scores.amax(dim=-1, keepdim=True)
        scores.sub_(highest.masked_fill(highest == -torch.inf, 0.0)).exp_()
        weights = scores.sum(dim=-1, keepdim=True)
        weights = torch.where(weights > 0, 1 / weights, 0.0).transpose(-1, -2)  # (B, G, H/G, 1, rows)
        total += (weights @ scores).sum(dim=(1, 2, 3))
    return total
