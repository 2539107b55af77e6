"""Packed layers, their exact reference arithmetic, the checkpoint format and its loading by diffusers."""

from attar.runtime.attention_backend import use_fast_attention
from attar.runtime.backend import backend_description, backend_name, use_backend
from attar.runtime.checkpoint import quantization_config_of, replace_linears
from attar.runtime.integrity import verify_folder
from attar.runtime.layers import PackedLinear, packed_layers
from attar.runtime.size import packed_size

__all__ = [
    "PackedLinear",
    "backend_description",
    "backend_name",
    "packed_layers",
    "packed_size",
    "quantization_config_of",
    "replace_linears",
    "use_backend",
    "use_fast_attention",
    "verify_folder",
]
