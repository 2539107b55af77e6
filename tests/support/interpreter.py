"""Triton's interpreter, mended where it does other than a GPU.

It cuts float32 to bfloat16 where a GPU rounds to nearest, rounds it to float8 without a carry into the exponent, and
multiplies the bits of bfloat16 numbers as if they were integers (triton 3.9). Kernels that are right on a GPU would
fail, so these are done here as a GPU does them. For every function that a kernel calls it also replaces what it has
replaced for the kernel already, which takes most of its time; here once a launch.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend() -> None:
    """Replaces these operations in this process."""
    trunc, dot = InterpreterBuilder.create_fp_trunc, InterpreterBuilder.create_dot
    convert = InterpreterBuilder.create_fp_to_fp

    def create_fp_trunc(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        return trunc(self, src, dst_type)

    def create_dot(self, a, b, d, *rest):
        if a.dtype.scalar == tl.bfloat16:
            wide = (TensorHandle(from_bfloat16(x.data), tl.float32) for x in (a, b))
            return dot(self, *wide, d, *rest)
        if a.dtype.scalar == tl.float8e4nv:
            wide = (TensorHandle(from_float8(x.data), tl.float32) for x in (a, b))
            return dot(self, *wide, d, *rest)
        return dot(self, a, b, d, *rest)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.float8e4nv:
            return TensorHandle(to_float8(src.data), tl.float8e4nv)
        if src.dtype.scalar == tl.float8e4nv and dst_type.scalar == tl.float32:
            return TensorHandle(from_float8(src.data), tl.float32)
        return convert(self, src, dst_type, rounding_mode)

    def create_fma(self, x, y, z):
        """Rounded once: a product of float32 numbers is exact in float64."""
        found = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(found.astype(x.data.dtype), z.dtype.scalar)

    patch_once_a_launch()
    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.create_fp_trunc, InterpreterBuilder.create_dot = create_fp_trunc, create_dot
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def patch_once_a_launch() -> None:
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched = set()

    def _patch_lang(fn):
        modules = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if modules in patched:
            return interpreter._LangPatchScope()
        patched.add(modules)
        return patch(fn)

    def restored(self):  # at the end of a launch
        restore(self)
        patched.clear()

    interpreter._patch_lang, interpreter._LangPatchScope.restore = _patch_lang, restored


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16 numbers, uint16, as the interpreter holds them."""
    return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16).float().numpy()


def to_float8(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of float8 numbers (e4m3fn), uint8."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def from_float8(bits: np.ndarray) -> np.ndarray:
    return (
        torch.from_numpy(np.ascontiguousarray(bits).view(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
    )
