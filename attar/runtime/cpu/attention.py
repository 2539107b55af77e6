"""The compiled kernel of attention as a Python function of tensors. Shapes are checked by the caller (attention.py)."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from attar.runtime.cpu.library import Library, check_memory


class _Places(Structure):
    _fields_ = (("batch", c_int64), ("token", c_int64), ("head", c_int64))


class _Attention(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "o")),
        *((name, c_int64) for name in ("batch", "queries", "keys", "heads", "width")),
        *((name, _Places) for name in ("q_places", "k_places", "v_places")),
        *(("scale", c_float), ("threads", c_int32)),
    )


def attention_kernel(kernels: Library) -> str | None:
    """The instruction set of the kernel beside that of the packed layers; None where there is none."""
    name = kernels.code.attar_attention_kernels(kernels.level)
    return name.decode() if name else None


def attention(kernels: Library, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """bfloat16 (batch, queries, heads, width) and (batch, keys, heads, width) twice -> as query, contiguous.

    scale > 0.
    """
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    batch, queries, heads, width = query.shape
    out = torch.empty(query.shape, dtype=query.dtype)
    call = _Attention(
        q=query.data_ptr(),
        k=key.data_ptr(),
        v=value.data_ptr(),
        o=out.data_ptr(),
        batch=batch,
        queries=queries,
        keys=key.shape[1],
        heads=heads,
        width=width,
        q_places=_Places(*query.stride()[:3]),
        k_places=_Places(*key.stride()[:3]),
        v_places=_Places(*value.stride()[:3]),
        scale=scale,
        threads=torch.get_num_threads(),
    )
    check_memory(kernels.code.attar_attention(ctypes.byref(call), kernels.level))
    return out
