"""Packed layers, their exact reference arithmetic, the checkpoint format and its loading by diffusers."""

from attar.runtime.backend import backend_description, backend_name
from attar.runtime.layers import PackedLinear, packed_layers
from attar.runtime.size import packed_size

__all__ = ["PackedLinear", "backend_description", "backend_name", "packed_layers", "packed_size"]
