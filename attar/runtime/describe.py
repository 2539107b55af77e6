"""What runs a packed pipeline, in a sentence for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from attar.runtime.backend import BACKENDS, backend_description, backend_name
from attar.runtime.layers import PackedLinear, packed_layers


def describe_backend(parts: Iterable[Any], device: torch.device | str) -> str | None:
    """The backend of all packed layers among `parts` (a pipeline's components), and how many of them, for want of
    kernels of their number format, run on the reference. None where nothing is packed."""
    layers = [
        layer for part in parts if isinstance(part, nn.Module) for layer in packed_layers(part).values()
    ]
    if not layers:
        return None
    text, name = backend_description(device), backend_name(device)
    if name == "reference":
        return text
    having = BACKENDS[name].formats()
    lacking = Counter(_numbers(layer) for layer in layers if not _formats(layer) <= having)
    if not lacking:
        return text
    kinds = ", ".join(f"{count} with {numbers}" for numbers, count in sorted(lacking.items()))
    return f"{text}; {lacking.total()} of {len(layers)} packed layers run on the slow reference: {kinds}"


def _formats(layer: PackedLinear) -> set[tuple[str, str | None]]:
    """(weights, activations); several where rows are of several kinds."""
    acts = None if layer.act_bits is None else layer.act_format
    return {(number, acts) for number in _weight_formats(layer)}


def _weight_formats(layer: PackedLinear) -> list[str]:
    return [layer.weight_format] if layer.rows is None else sorted({kind.number for kind in layer.rows})


def _numbers(layer: PackedLinear) -> str:
    acts = "floating-point" if layer.act_bits is None else layer.act_format
    return f"{' and '.join(_weight_formats(layer))} weights and {acts} activations"
