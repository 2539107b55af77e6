"""Feed-forwards of T5, UMT5 and mT5 whose last linear is packed.

transformers asks its `weight` for the dtype in every forward, and the weight of a packed layer is computed when it is
asked for. So such a feed-forward asks the layer itself. With another `wo`, such as a LoRA around it, it is as ever.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.mt5.modeling_mt5 import MT5DenseActDense, MT5DenseGatedActDense
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense
from transformers.models.umt5.modeling_umt5 import UMT5DenseActDense, UMT5DenseGatedActDense

from attar.runtime.layers import PackedLinear


class _Packed(nn.Module):
    """Comes before transformers' class: wo(dropout(inner(x))), the input of `wo` in the dtype of the model."""

    wo: Any
    dropout: Any

    def inner(self, hidden_states: Tensor) -> Tensor:
        """(..., d_model) -> (..., d_ff), activated."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., d_model) -> (..., d_model)."""
        if not isinstance(self.wo, PackedLinear):
            return super().forward(hidden_states)
        return self.wo(self.dropout(self.inner(hidden_states)).to(self.wo.compute_dtype))


class _Plain(_Packed):
    act: Any
    wi: Any

    def inner(self, hidden_states: Tensor) -> Tensor:
        return self.act(self.wi(hidden_states))


class _Gated(_Packed):
    act: Any
    wi_0: Any
    wi_1: Any

    def inner(self, hidden_states: Tensor) -> Tensor:
        return self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)


class PackedT5(_Plain, T5DenseActDense): ...


class PackedGatedT5(_Gated, T5DenseGatedActDense): ...


class PackedUMT5(_Plain, UMT5DenseActDense): ...


class PackedGatedUMT5(_Gated, UMT5DenseGatedActDense): ...


class PackedMT5(_Plain, MT5DenseActDense): ...


class PackedGatedMT5(_Gated, MT5DenseGatedActDense): ...


_PACKED: dict[type[nn.Module], type[nn.Module]] = {
    packed.__mro__[[*packed.__mro__].index(_Packed) + 1]: packed
    for packed in (PackedT5, PackedGatedT5, PackedUMT5, PackedGatedUMT5, PackedMT5, PackedGatedMT5)
}


def spare_weights(model: nn.Module) -> int:
    """Gives every such feed-forward with a packed `wo` the class above; returns how many there were.

    In place. Names, tensors and what is saved stay the same.
    """
    found = [m for m in model.modules() if type(m) in _PACKED and isinstance(m.wo, PackedLinear)]
    for module in found:
        module.__class__ = _PACKED[type(module)]
    return len(found)
