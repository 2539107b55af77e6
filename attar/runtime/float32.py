"""A module whose floating-point buffers stay what they are when the model is cast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class KeepsBufferDtype(nn.Module):
    """`.to(torch.bfloat16)`, `.half()`, `.float()` move the buffers but never round them.

    Scales and transforms in float32 are part of the quantized weight; a cast of the model is about the
    arithmetic of its other layers.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsBufferDtype:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = (
                    torch.empty_like(old, device="meta") if new.is_meta else old.to(new.device)
                )
        return self
