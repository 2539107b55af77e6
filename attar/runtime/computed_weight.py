"""What the `weight` of a packed layer gives: a tensor that was computed, and that nothing may be written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attar.errors import AttarError


def computed_weight(weight: Tensor, *, shifted: bool, gated: bool) -> Tensor:
    """The weight, read-only. AttarError for writing to it; for its `.data` too where inputs are shifted or the branch
    has a gate, since weight and bias are not the layer then."""
    found = weight.as_subclass(_ReadOnlyWeight)
    found.shifted, found.gated = shifted, gated
    return found


_HARMLESS = ("requires_grad_", "retain_grad", "detach_", "share_memory_", "rename_")  # of no values
_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and",
                                         "or", "xor", "lshift", "rshift", "matmul")} | {"__setitem__"}  # fmt: skip


class _ReadOnlyWeight(torch.Tensor):
    """A computed weight: writing to it or its `.data`, as merging a LoRA does, would be lost without a word.

    What is computed of it is an ordinary tensor.
    """

    shifted = False
    gated = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        ends = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
        if ends or name in _IN_PLACE:
            _refuse(args[0] if args else kwargs.get("self", kwargs.get("tensor")))
        _refuse(kwargs.get("out"))
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        if self.gated:
            raise AttarError(
                "the branch of this packed layer has a gate over frames, so its weight cannot be fused with others",
                fix="Leave projections apart, or compress with quantize.low_rank.gate=none",
            )
        if self.shifted:
            raise AttarError(
                "the bias of this packed layer belongs to shifted inputs, so its weight cannot be fused with others",
                fix="Leave projections apart, or compress with quantize.shift=false",
            )
        return self.detach().as_subclass(_ReadOnlyWeight)

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse(self)


def _refuse(written: Any) -> None:
    if isinstance(written, _ReadOnlyWeight):
        raise AttarError(
            "the weight of a packed layer cannot be written",
            fix="Keep the LoRA unfused, or fuse it into the full-precision model before compressing",
        )
