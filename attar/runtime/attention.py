"""`torch.ops.attar.attention`: softmax(scale · q kᵀ) v as one operator, with a kernel for bfloat16 on processors.

torch's own kernel for processors reaches about a third of the rate of its matrix product. Ours is flash attention:
products of bfloat16 summed in float32, a softmax that is corrected as keys come, no map of queries by keys. What it
does not take goes to torch's `scaled_dot_product_attention`, the definition.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.errors import AttarError
from attar.runtime.backend import backend_name
from attar.runtime.cpu.attention import attention as compiled
from attar.runtime.cpu.attention import attention_kernel
from attar.runtime.cpu.library import library

_NAME = "attar::attention"
MAX_WIDTH = 256  # of a head: what a task keeps for it stays in the second-level cache

torch.library.define(_NAME, "(Tensor query, Tensor key, Tensor value, float scale) -> Tensor")


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """query (batch, queries, heads, width), key and value (batch, keys, heads, width) -> as query, in its dtype.

    scale: of the products, width^-0.5 by default. No mask and no dropout. With gradients it is torch's attention.
    Raises AttarError when the shapes do not belong together.
    """
    batch, _, heads, width = query.shape
    if key.shape != value.shape or (key.shape[0], *key.shape[2:]) != (batch, heads, width):
        raise AttarError(
            f"no attention of {tuple(query.shape)} over {tuple(key.shape)} and {tuple(value.shape)}",
            fix="Give (batch, tokens, heads, width), all but the tokens alike",
        )
    scale = math.sqrt(1 / width) if scale is None else scale
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return _torch(query, key, value, scale)
    return torch.ops.attar.attention(query, key, value, scale)


def has_kernel(device: torch.device | str = "cpu") -> bool:
    """Whether the operator is faster than torch's attention on `device`, at least in bfloat16."""
    return backend_name(device) == "cpu" and attention_kernel(library()) is not None


def _torch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).contiguous()


def _cpu(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    same = query.dtype == key.dtype == value.dtype == torch.bfloat16
    if same and scale > 0 and query.numel() and key.numel() and query.shape[-1] <= MAX_WIDTH and has_kernel():
        return compiled(library(), query, key, value, scale)
    return _torch(query, key, value, scale)


def _fake(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape)


torch.library.register_fake(_NAME, _fake)
torch.library.impl(_NAME, "default", _torch)
torch.library.impl(_NAME, "cpu", _cpu)
