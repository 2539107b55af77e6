"""The compiled kernels of training as Python functions of tensors, which are contiguous float32 on CPU.

Results depend neither on the number of threads nor on how rows are divided among them.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from attar.errors import AttarError
from attar.runtime.cpu.library import check_memory, library

_PART, _PARTS = 64, 256  # rows whose gradients are summed in one go at least, and the most such sums


class _FakeQuantize(Structure):
    _fields_ = (
        *(("x", c_void_p), ("rows", c_int64), ("k", c_int64)),
        *(("low_factor", c_void_p), ("high_factor", c_void_p), ("stride", c_int64)),
        *(("bits", c_int32), ("full_range", c_int32), ("threads", c_int32)),
        *(("smallest", c_void_p), ("largest", c_void_p)),
        *(("y", c_void_p), ("grad", c_void_p)),
        *(("grad_x", c_void_p), ("grad_low", c_void_p), ("grad_high", c_void_p)),
    )


class _Kronecker(Structure):
    _fields_ = (
        *(("x", c_void_p), ("rows", c_int64), ("l", c_int32), ("r", c_int32)),
        *(("left", c_void_p), ("right", c_void_p), ("right_t", c_void_p)),
        *(("y", c_void_p), ("grad", c_void_p), ("grad_x", c_void_p), ("sums", c_void_p)),
        *(("part", c_int64), ("threads", c_int32)),
    )


class _Cayley(Structure):
    _fields_ = (
        *(("parameter", c_void_p), ("count", c_int64), ("n", c_int64)),
        *(("inverse", c_void_p), ("rotation", c_void_p), ("grad", c_void_p), ("grad_parameter", c_void_p)),
    )


def fake_quantize(x: Tensor, factors: Tensor, bits: int, full_range: bool = False) -> tuple[Tensor, Tensor]:
    """x (..., k), factors (2,) or (2, rows...) -> x̂ (..., k), and the rows' (smallest, largest) (2, rows)."""
    y = torch.empty_like(x)
    extremes = x.new_empty(2, x.numel() // x.shape[-1])
    call = _fake_quantize_call(x, factors, bits, extremes, full_range)
    call.y = y.data_ptr()
    library().code.attar_fake_quantize(ctypes.byref(call), library().level)
    return y, extremes


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    factors: Tensor,
    bits: int,
    extremes: Tensor,
    full_range: bool = False,
    with_x: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Gradient of x, or None, and those of the factors in each row (2, rows)."""
    grad_x = torch.empty_like(x) if with_x else None
    grad_rows = torch.empty_like(extremes)
    call = _fake_quantize_call(x, factors, bits, extremes, full_range)
    call.grad = grad.data_ptr()
    call.grad_x = None if grad_x is None else grad_x.data_ptr()
    call.grad_low, call.grad_high = _halves(grad_rows)
    library().code.attar_fake_quantize_backward(ctypes.byref(call), library().level)
    return grad_x, grad_rows


def _fake_quantize_call(
    x: Tensor, factors: Tensor, bits: int, extremes: Tensor, full_range: bool
) -> _FakeQuantize:
    low_factor, high_factor = _halves(factors)
    smallest, largest = _halves(extremes)
    return _FakeQuantize(
        x=x.data_ptr(),
        rows=extremes.shape[1],
        k=x.shape[-1],
        low_factor=low_factor,
        high_factor=high_factor,
        stride=0 if factors.ndim == 1 else 1,
        bits=bits,
        full_range=full_range,
        threads=torch.get_num_threads(),
        smallest=smallest,
        largest=largest,
    )


def _halves(pair: Tensor) -> tuple[int, int]:
    """Addresses of pair[0] and pair[1]."""
    first = pair.data_ptr()
    return first, first + pair.numel() // 2 * pair.element_size()


def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (left ⊗ right): (..., l·r) -> (..., l·r)."""
    y = torch.empty_like(x)
    call = _kronecker_call(x, left, right)
    call.y = y.data_ptr()
    check_memory(library().code.attar_kronecker(ctypes.byref(call), library().level))
    return y


def kronecker_backward(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, with_x: bool = True, with_factors: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, left (l, l) and right (r, r), each None unless asked for."""
    call = _kronecker_call(x, left, right)
    transposed = right.mT.contiguous()
    grad_x = torch.empty_like(x) if with_x else None
    sums = None
    if with_factors:
        parts = -(-call.rows // call.part)
        sums = x.new_empty(parts, left.numel() + right.numel())
    call.right_t, call.grad = transposed.data_ptr(), grad.data_ptr()
    call.grad_x = None if grad_x is None else grad_x.data_ptr()
    call.sums = None if sums is None else sums.data_ptr()
    check_memory(library().code.attar_kronecker(ctypes.byref(call), library().level))
    if sums is None:
        return grad_x, None, None
    grad_left, grad_right = sums.sum(0).split([left.numel(), right.numel()])
    return grad_x, grad_left.view_as(left), grad_right.view_as(right)


def _kronecker_call(x: Tensor, left: Tensor, right: Tensor) -> _Kronecker:
    if left.ndim != 2 or right.ndim != 2 or x.shape[-1] ** 2 != left.numel() * right.numel():
        raise AttarError(f"{tuple(left.shape)} ⊗ {tuple(right.shape)} does not fit rows of {x.shape[-1]}")
    rows = x.numel() // x.shape[-1]
    return _Kronecker(
        x=x.data_ptr(),
        rows=rows,
        l=left.shape[0],
        r=right.shape[0],
        left=left.data_ptr(),
        right=right.data_ptr(),
        part=max(_PART, -(-rows // _PARTS)),
        threads=torch.get_num_threads(),
    )


def cayley(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters (..., n, n) -> rotations and the inverses (I + K)^{-1} behind them."""
    rotation, inverse = torch.empty_like(parameter), torch.empty_like(parameter)
    call = _Cayley(parameter=parameter.data_ptr(), rotation=rotation.data_ptr())
    _run_cayley(call, inverse)
    return rotation, inverse


def cayley_backward(grad: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of the parameters."""
    grad_parameter = torch.empty_like(inverse)
    call = _Cayley(grad=grad.data_ptr(), grad_parameter=grad_parameter.data_ptr())
    _run_cayley(call, inverse)
    return grad_parameter


def _run_cayley(call: _Cayley, inverse: Tensor) -> None:
    call.inverse, call.n = inverse.data_ptr(), inverse.shape[-1]
    call.count = inverse.numel() // call.n**2
    check_memory(library().code.attar_cayley(ctypes.byref(call), library().level))
