"""Tensors at addresses where kernels give the same bits whichever way a model was loaded."""

from __future__ import annotations

from torch import nn

_BYTES = 64  # a cache line, at which torch's own allocations begin


def align(module: nn.Module) -> None:
    """Own memory for tensors that lie in a mapped file at odd addresses, where matrix kernels may round otherwise."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.device.type == "cpu" and tensor.data_ptr() % _BYTES:
            tensor.data = tensor.data.clone()
