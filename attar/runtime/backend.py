"""Which implementation runs the packed layers.

`reference` is plain PyTorch on any device, and the definition. `cpu` are compiled kernels, `triton` kernels for NVIDIA
GPUs. For each device the fastest one that works is chosen; `use_backend` and the environment variable ATTAR_BACKEND
force one.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attar.errors import AttarError
from attar.runtime.branch import Branch
from attar.runtime.cpu.attention import attention_kernel
from attar.runtime.cpu.library import library
from attar.runtime.triton.available import describe_triton, interpreting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of inputs of the kernels
MAX_IN_FEATURES = 2**17 - 1  # up to here no sum of products of bytes leaves 32 bits
_VARIABLE = "ATTAR_BACKEND"
_REFERENCE = (
    "reference: plain PyTorch, the exact integer arithmetic of the compressed model on any device; "
    "it saves memory, and is not fast"
)


INTEGERS: frozenset[tuple[str, str | None]] = frozenset(
    {("int", "int"), ("int", "full_range"), ("int", None)}
)
FLOAT8: frozenset[tuple[str, str | None]] = frozenset({("fp8", "fp8"), ("fp8", None)})
Step = tuple[str, Sequence[Tensor]]  # the kind of a transform and its operands


class Kernels(Protocol):
    """What a backend does with x (..., in), of one of DTYPES, once the operator has checked the shapes.

    Both give (..., out). The arguments are those of `packed_linear`.
    """

    def fusable(self, steps: Sequence[Step], x: Tensor) -> int:
        """How many of the last transforms `linear` can compute of x; the operator does the others before."""
        ...

    def linear(
        self,
        x: Tensor,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        clip: Tensor | None,
        weight_bits: int,
        act_bits: int,
        steps: Sequence[Step],
        out_dtype: torch.dtype,
        gelu: str | None = None,
        number: str = "int",
        branch: Branch | None = None,
    ) -> Tensor:
        """Transforms, quantization of rows, product, scales, bias, branch, and GELU before the only rounding.

        number: the format of the activations; the weights have the same one, or integers. branch: low (..., rank) and
        up (out, rank). A backend may also add the branch, and compute GELU, behind the rounding.
        """
        ...

    def weight_only(
        self,
        x: Tensor,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        bits: int,
        number: str = "int",
    ) -> Tensor:
        """The product with the dequantized weight, in x's type."""
        ...


@dataclass(frozen=True)
class Backend:
    """An implementation that is faster than the reference.

    `check` raises AttarError when the backend cannot work on this machine; it is asked at every call of a layer.
    `describe` gives a sentence for people.
    `emulated` says whether it can also be forced on the CPU, for tests.
    """

    name: str
    device: str  # type of the devices that it runs on
    check: Callable[[], object]
    describe: Callable[[], str]
    load: Callable[[], Kernels]
    # of (weights, activations) that have kernels; None: floating point
    formats: Callable[[], frozenset[tuple[str, str | None]]] = lambda: INTEGERS
    emulated: Callable[[], bool] = lambda: False

    def runs_on(self, device: str) -> bool:
        return device == self.device or (device == "cpu" and self.emulated())


def _describe_cpu() -> str:
    kernel = attention_kernel(library())
    attention = f"of our own in bfloat16 ({kernel})" if kernel else "torch's"
    return (
        f"cpu: compiled kernels ({library().describe()}) with the integers of the reference; weights stay packed "
        f"in memory, and float64 inputs run on the reference; attention {attention}"
    )


@functools.cache
def _triton_formats() -> frozenset[tuple[str, str | None]]:
    """Float8 where the tensor cores have it: compute capability 8.9 and above. (All GPUs of a machine are alike.)"""
    if interpreting() or torch.cuda.get_device_capability() >= (8, 9):
        return INTEGERS | FLOAT8
    return INTEGERS


def _load_triton() -> Kernels:
    from attar.runtime.triton.kernels import KERNELS  # not before it is needed: it imports Triton

    return KERNELS


BACKENDS: dict[str, Backend] = {
    "cpu": Backend("cpu", "cpu", library, _describe_cpu, library),
    "triton": Backend(
        "triton", "cuda", describe_triton, describe_triton, _load_triton, _triton_formats, interpreting
    ),
}
_forced: list[str] = []


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend, "reference", "cpu" or "triton", in the whole process while the context lasts.

    Raises AttarError at once for an unknown name, and for a backend that does not work on this machine.
    """
    _check(name, "use_backend")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def backend_name(device: torch.device | str = "cpu") -> str:
    """Name of the backend that runs on `device`. AttarError where a forced one cannot."""
    return _choice(_type_of(device))[0]


def backend_description(device: torch.device | str = "cpu") -> str:
    """One sentence for people: what runs on `device`, and if it is the reference by necessity, why."""
    name, why = _choice(_type_of(device))
    if name != "reference":
        return BACKENDS[name].describe()
    return _REFERENCE if why is None else f"{_REFERENCE} ({why})"


def _type_of(device: torch.device | str) -> str:
    return device.type if isinstance(device, torch.device) else torch.device(device).type


def forced_backend() -> str | None:
    """The name given by `use_backend`, else by the environment, else None."""
    return _forced[-1] if _forced else os.environ.get(_VARIABLE) or None


def _choice(device: str) -> tuple[str, str | None]:
    """Name of the backend for a type of device, and why it is the reference where nobody asked for that."""
    forced = forced_backend()
    if forced is not None:
        _check(forced, _VARIABLE)
        if forced != "reference" and not BACKENDS[forced].runs_on(device):
            raise AttarError(
                f"the backend {forced!r} does not run on {device}",
                where=_VARIABLE,
                fix="Move the model, or leave the choice to attar",
            )
        return forced, None
    for backend in BACKENDS.values():
        if backend.device == device:
            try:
                backend.check()
            except AttarError as error:
                return "reference", f"no kernels for {device}: {error.what}"
            return backend.name, None
    return "reference", None if device == "meta" else f"no kernels for {device} yet"


def _check(name: str, where: str) -> None:
    if name == "reference":
        return
    if name not in BACKENDS:
        known = ", ".join(["reference", *BACKENDS])
        raise AttarError(f"unknown backend {name!r}", where=where, fix=f"Choose one of {known}")
    try:
        BACKENDS[name].check()
    except AttarError as error:
        raise AttarError(
            f"the backend {name!r} does not work here: {error.what}",
            where=error.where or where,
            fix=error.fix or "Use the backend 'reference'",
        ) from error
