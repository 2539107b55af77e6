"""attar's attention as a backend of diffusers' dispatcher, named "attar".

diffusers asks each attention processor for the name of its backend. It has a call to register a backend, but its names
are a closed enumeration; `register` adds a member to that. Models whose processors call torch without the dispatcher
(CogVideoX, PixArt) are left as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_dispatch as diffusers_attention
from torch import Tensor, nn

from attar.runtime.attention import attention

NAME = "attar"
_Names = diffusers_attention.AttentionBackendName
_Registry = diffusers_attention._AttentionBackendRegistry


def use_fast_attention(model: Any, on: bool = True) -> int:
    """Lets attar compute the attention of a model, or of a pipeline's transformers, where no other backend was chosen.

    In place; returns how many attentions that are. Packed models have it from the start; `on=False` gives them back to
    diffusers, as `model.set_attention_backend("native")` does. Masks, dropout, other types than bfloat16 and other
    devices than processors go on to the backend that diffusers has active. Results differ from torch's by the rounding
    of bfloat16.
    """
    modules = [model] if isinstance(model, nn.Module) else list(_transformers(model))
    before, after = (None, _Names(NAME)) if on else (_Names(NAME), None)
    count = 0
    for module in (part for whole in modules for part in whole.modules()):
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend") and processor._attention_backend is before:
            processor._attention_backend = after
            count += 1
    return count


def _transformers(pipeline: Any) -> list[nn.Module]:
    names = ("transformer", "transformer_2", "unet")
    return [part for name in names if isinstance(part := getattr(pipeline, name, None), nn.Module)]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """As diffusers calls a backend: (batch, tokens, heads, width) in and out."""
    active: Any = _Registry.get_active_backend()[0]
    plain = (
        attn_mask is None and dropout_p == 0 and not is_causal and not enable_gqa and _parallel_config is None
    )
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if plain and not gradients and _takes(query, key, value) and active.value in ("native", NAME):
        return attention(query, key, value, scale)
    return diffusers_attention.dispatch_attention_fn(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        backend=_Names.NATIVE if active.value == NAME else None, parallel_config=_parallel_config,
    )  # fmt: skip


def _takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    alike = query.dtype == key.dtype == value.dtype == torch.bfloat16 and key.shape == value.shape
    return alike and query.device.type == "cpu" and query.shape[2:] == key.shape[2:]


def register() -> None:
    """Makes diffusers know the backend; repeating it is harmless."""
    if NAME not in _Names._value2member_map_:
        member = str.__new__(_Names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        member.__objclass__ = _Names  # type: ignore[attr-defined]
        _Names._member_names_.append(member._name_)
        _Names._member_map_[member._name_] = member
        _Names._value2member_map_[NAME] = member
    _Registry.register(_Names(NAME))(_attention)
