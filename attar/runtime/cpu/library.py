"""The compiled kernels as Python functions of tensors. Shapes are checked by the caller (ops.py)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from ctypes import POINTER, Structure, c_char_p, c_int, c_int32, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.errors import AttarError, reason
from attar.runtime.branch import Branch
from attar.runtime.cpu.build import built_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
STEPS = {"channel_scale": 0, "hadamard": 1, "kronecker": 2, "channel_shift": 3}
GELUS = {None: 0, "none": 1, "tanh": 2}
_VARIABLE = "ATTAR_CPU_KERNELS"
_MATRICES = "amx-int8"  # the kernels with matrix registers
_REGISTER = 32  # what rows, outputs and ranks of a branch are rounded up to, so that tiles need no edges
_PANEL_BYTES = 2**23  # of a dequantized weight, which is never whole in memory


class _Step(Structure):
    _fields_ = (
        *(("kind", c_int32), ("rows", c_int32), ("cols", c_int32), ("dtype", c_int32)),
        *(("a", c_void_p), ("b", c_void_p)),
    )


class _Weight(Structure):
    _fields_ = (
        *(("codes", c_void_p), ("n", c_int64), ("k", c_int64), ("row_bytes", c_int64)),
        *(("bits", c_int32), ("groups", c_int32), ("scale", c_void_p)),
    )


class _Branch(Structure):
    _fields_ = (
        *(("low", c_void_p), ("up", c_void_p), ("rank", c_int64), ("stride", c_int64), ("matrices", c_int32)),
    )


class _Linear(Structure):
    _fields_ = (
        *(("x", c_void_p), ("y", c_void_p), ("m", c_int64), ("weight", _Weight)),
        *(("bias", c_void_p), ("clip", c_void_p), ("steps", c_void_p)),
        *(("n_steps", c_int32), ("act_bits", c_int32), ("full_range", c_int32)),
        *(("x_dtype", c_int32), ("y_dtype", c_int32), ("bias_dtype", c_int32), ("gelu", c_int32)),
        *(("branch", _Branch), ("threads", c_int32)),
    )


class Library:
    """The loaded kernels. `levels`: the instruction sets that this processor runs, slowest first."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        code = ctypes.CDLL(os.fspath(path))
        code.attar_kernels.restype = c_char_p
        code.attar_linear.argtypes = [POINTER(_Linear), c_int]
        code.attar_dequantize.argtypes = [POINTER(_Weight), c_int64, c_int64, c_void_p, c_int32, c_int, c_int]
        code.attar_attention.argtypes = [c_void_p, c_int]
        code.attar_attention_kernels.restype = c_char_p
        for name in ("fake_quantize", "fake_quantize_backward", "kronecker", "cayley"):
            getattr(code, f"attar_{name}").argtypes = [c_void_p, c_int]
        code.attar_fake_quantize.restype = code.attar_fake_quantize_backward.restype = None
        self.code = code
        names = ((code.attar_kernels(level), level) for level in range(8))
        self.levels: dict[str, int] = {name.decode(): level for name, level in names if name}
        self.has_threads = bool(code.attar_has_threads())
        self.kernels = list(self.levels)[-1]
        named = os.environ.get(_VARIABLE)
        if named:
            self._check(named)
            self.kernels = named

    def describe(self) -> str:
        """The instruction set in use, and whether the kernels use more than one thread."""
        return self.kernels if self.has_threads else f"{self.kernels}, one thread"

    @contextlib.contextmanager
    def use_kernels(self, name: str) -> Iterator[None]:
        """Runs the kernels of one instruction set; AttarError where the processor lacks it."""
        self._check(name)
        before, self.kernels = self.kernels, name
        try:
            yield
        finally:
            self.kernels = before

    def fusable(self, steps: Sequence[tuple[str, Sequence[Tensor]]], x: Tensor) -> int:
        """How many of the last transforms the kernel can compute while it reads a row."""
        count = 0
        for kind, _ in reversed(steps):
            if kind not in STEPS:
                break
            count += 1
        return count

    def linear(
        self,
        x: Tensor,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        clip: Tensor | None,
        weight_bits: int,
        act_bits: int,
        steps: Sequence[tuple[str, Sequence[Tensor]]],
        out_dtype: torch.dtype,
        gelu: str | None = None,
        number: str = "int",
        branch: Branch | None = None,
    ) -> Tensor:
        """x (..., in), floats out of DTYPES, -> transforms -> codes -> integer product -> (..., out) in `out_dtype`.

        `steps` are kinds out of STEPS with the operands of their transforms, in order. branch: low (..., rank) and
        up (out, rank), whose product is added.
        """
        x = x.contiguous()
        alive: list[Tensor] = []  # what the pointers point into
        shape, width = x.shape[:-1], x.shape[-1]
        y = torch.empty(*shape, codes.shape[0], dtype=out_dtype)
        bias_type, bias_place = (0, None) if bias is None else _place(bias, alive)
        fields = [_step(kind, operands, alive) for kind, operands in steps]
        array = (_Step * len(fields))(*fields)
        call = _Linear(
            x=x.data_ptr(),
            y=y.data_ptr(),
            m=shape.numel(),
            weight=_weight(codes, weight_scale, weight_bits, width, alive),
            bias=bias_place,
            clip=None if clip is None else _float32(clip, alive),
            steps=ctypes.addressof(array),
            n_steps=len(fields),
            act_bits=act_bits,
            full_range=number == "full_range",
            x_dtype=DTYPES[x.dtype],
            y_dtype=DTYPES[out_dtype],
            bias_dtype=bias_type,
            gelu=GELUS[gelu],
            branch=_Branch() if branch is None else _branch(*branch, self.kernels == _MATRICES, alive),
            threads=torch.get_num_threads(),
        )
        if x.numel() and y.numel():
            check_memory(self.code.attar_linear(ctypes.byref(call), self.level))
        return y

    def weight_only(
        self,
        x: Tensor,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        bits: int,
        number: str = "int",
    ) -> Tensor:
        """x (..., in) times the weight, of which one panel of outputs at a time is in floating point."""
        shape, (outputs, width) = x.shape[:-1], (codes.shape[0], x.shape[-1])
        x = x.reshape(-1, width)
        bias = None if bias is None else bias.to(x.dtype)
        y = x.new_empty(x.shape[0], outputs)
        count = min(outputs, max(64, _PANEL_BYTES // (width * x.element_size())))
        panel = x.new_empty(count, width)
        for first in range(0, outputs, count):
            last = min(outputs, first + count)
            part = panel[: last - first]
            self.dequantize(codes, weight_scale, bits, first, last - first, part)
            y[:, first:last] = F.linear(x, part, None if bias is None else bias[first:last])
        return y.view(*shape, outputs)

    def dequantize(
        self, codes: Tensor, weight_scale: Tensor, bits: int, first: int, count: int, out: Tensor
    ) -> None:
        """Writes codes · scale of `count` outputs from `first` on into `out` (count, in), rounded to its type."""
        alive: list[Tensor] = []
        weight = _weight(codes, weight_scale, bits, out.shape[1], alive)
        threads = torch.get_num_threads()
        place = out.data_ptr()
        check_memory(
            self.code.attar_dequantize(
                ctypes.byref(weight), first, count, place, DTYPES[out.dtype], threads, self.level
            )
        )

    @property
    def level(self) -> int:
        """What the entry points are told of the instruction set in use."""
        return self.levels[self.kernels]

    def _check(self, name: str) -> None:
        if name not in self.levels:
            raise AttarError(
                f"this processor has no kernels {name!r}",
                where=_VARIABLE,
                fix=f"Choose one of {', '.join(self.levels)}",
            )


_lock = threading.Lock()
_found: Library | AttarError | None = None


def library() -> Library:
    """The kernels of this machine, compiled and loaded once. AttarError where that fails, the same each time."""
    global _found
    with _lock:
        if _found is None:
            try:
                _found = Library(built_library())
            except AttarError as error:
                _found = error
            except OSError as error:
                _found = AttarError(f"the compiled kernels cannot be loaded ({reason(error)})")
    if isinstance(_found, AttarError):  # anew: one that is raised again and again collects tracebacks
        raise AttarError(_found.what, where=_found.where, fix=_found.fix)
    return _found


def _float32(tensor: Tensor, alive: list[Tensor]) -> int:
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        tensor = tensor.detach().to(torch.float32).contiguous()
    alive.append(tensor)
    return tensor.data_ptr()


def _place(tensor: Tensor, alive: list[Tensor]) -> tuple[int, int]:
    """The number of a tensor's type and where it lies; what the kernels do not widen themselves is made float32."""
    if tensor.dtype not in DTYPES:
        return 0, _float32(tensor, alive)
    tensor = tensor.contiguous()
    alive.append(tensor)
    return DTYPES[tensor.dtype], tensor.data_ptr()


def _weight(codes: Tensor, scale: Tensor, bits: int, in_features: int, alive: list[Tensor]) -> _Weight:
    codes = codes.contiguous()
    alive.append(codes)
    return _Weight(
        codes=codes.data_ptr(),
        n=codes.shape[0],
        k=in_features,
        row_bytes=codes.shape[1],
        bits=bits,
        groups=scale.shape[1],
        scale=_float32(scale, alive),
    )


def _branch(low: Tensor, up: Tensor, matrices: bool, alive: list[Tensor]) -> _Branch:
    """low (..., rank), up (out, rank). matrices: whether the kernels have registers for those of bfloat16."""
    low, (outputs, rank) = low.reshape(-1, low.shape[-1]), up.shape
    more = -rank % _REGISTER
    if not matrices or not low.dtype == up.dtype == torch.bfloat16:
        up = F.pad(up.T, (0, -outputs % _REGISTER))
        return _Branch(low=_float32(low, alive), up=_float32(up, alive), rank=rank, stride=up.shape[1])
    low = F.pad(low, (0, more, 0, -low.shape[0] % _REGISTER)).contiguous()
    up = F.pad(up, (0, more, 0, -outputs % _REGISTER)).unflatten(1, (-1, 2)).transpose(0, 1).contiguous()
    alive += [low, up]
    return _Branch(low=low.data_ptr(), up=up.data_ptr(), rank=low.shape[1], stride=up.shape[1], matrices=True)


def _step(kind: str, operands: Sequence[Tensor], alive: list[Tensor]) -> _Step:
    if len(operands) == 1:
        return _Step(STEPS[kind], 0, 0, *_place(operands[0], alive), None)
    first, second = operands
    rows = first.shape[0] if kind == "kronecker" else second.shape[0]
    cols = second.shape[0] if kind == "kronecker" else first.shape[1] // rows
    if first.dtype != second.dtype:
        first, second = first.to(torch.float32), second.to(torch.float32)
    return _Step(STEPS[kind], rows, cols, *_place(first, alive), _place(second, alive)[1])


def check_memory(failed: int) -> None:
    """MemoryError when an entry point says that it failed."""
    if failed:
        raise MemoryError("the compiled kernels got no memory")
