"""Looking at what goes into layers while a block runs on its calibration calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attar.runtime.autocast import full_precision


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: Callable[[str, Any, Tensor], None]) -> Iterator[None]:
    """Inside, without gradients, `see` gets (name, layer, its input) whenever one of the layers is called.

    What it computes is not autocast, whatever the layers are called in.
    """

    def hook(name: str) -> Callable[..., None]:
        def seen(layer: nn.Module, args: Any) -> None:
            with full_precision(args[0].device):
                see(name, layer, args[0])

        return seen

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
