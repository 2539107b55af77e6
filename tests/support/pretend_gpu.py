"""A GPU that is not there: tensors "on" it lie in the processor's memory, and know where they claim to be.

What it finds are mistakes that no machine without a GPU shows otherwise: tensors of two devices in one operation, a
tensor that is made where its neighbours are not, a generator of another device. It computes what a processor does.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

GPU = torch.device("cuda", 0)
# what makes a tensor of no other one
FACTORIES = {
    "empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange", "linspace", "logspace", "eye",
    "tensor", "as_tensor", "asarray", "from_numpy", "frombuffer", "empty_strided", "scalar_tensor", "hann_window",
    "tril_indices", "triu_indices", "normal",
}  # fmt: skip
ANYWHERE = {"copy_", "__set__", "_has_compatible_shallow_copy_type", "set_"}
INDEXING = {"__getitem__", "__setitem__", "index_put_", "index_put"}
TO_HOST = {"numpy", "__array__"}


def on_gpu(tensor: Tensor) -> bool | None:
    """Whether a tensor claims to be there; None where nobody said, as of gradients."""
    return getattr(tensor.untyped_storage(), "claims_gpu", None)


def claim(tensor: Tensor, gpu: bool) -> Tensor:
    """Says where the memory of a tensor is."""
    tensor.untyped_storage().claims_gpu = gpu  # views, parameters and `.data` share it
    return tensor


def is_gpu(device: Any) -> bool:
    return device is not None and not isinstance(device, Tensor) and torch.device(device).type == "cuda"


class PretendGPU(TorchFunctionMode):
    """Inside, "cuda" is a device. Raises RuntimeError, as torch would, where tensors of two devices meet."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            return self._attribute(func, args)
        if name == "_parse_to":  # only names a device
            if args and isinstance(args[0], Tensor):
                args = (GPU if self._there(args[0]) else torch.device("cpu"), args[0].dtype)
            return func(*args, **kwargs)
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and not _odd(t)]
        if name in ("to", "cuda", "cpu"):
            return self._moved(func, name, args, kwargs)
        if name in TO_HOST and any(on_gpu(t) for t in tensors):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "get_device" and tensors and self._there(args[0]):
            return 0
        there = self._agree(name, args, tensors)
        wanted = kwargs.get("device")
        if wanted is not None:
            there = is_gpu(wanted)
            if there:
                kwargs["device"] = torch.device("cpu")
        elif name in FACTORIES and not tensors:
            there = False
        generator = kwargs.get("generator") or next((a for a in args if isinstance(a, REAL_GENERATOR)), None)
        if generator is not None and isinstance(generator, GPUGenerator) != there:
            raise RuntimeError(f"{name}: a generator of another device than the tensor's")
        known = {id(t) for t in tensors}
        found = func(*args, **kwargs)
        for tensor in tree_flatten(found)[0]:
            if isinstance(tensor, Tensor) and not _odd(tensor) and id(tensor) not in known:
                before = on_gpu(tensor)
                if before is None:
                    claim(tensor, bool(there))
                elif wanted is not None and before != there:  # torch.as_tensor moved it
                    return claim(tensor.clone(), bool(there))
        return found

    def _there(self, tensor: Any) -> bool:
        """What nobody said comes from torch's autograd, which works where the model is."""
        return on_gpu(tensor) is not False

    def _attribute(self, func: Any, args: Any) -> Any:
        owner, tensor = getattr(func, "__self__", None), args[0]
        which = getattr(owner, "__name__", "")
        if isinstance(tensor, Tensor) and not _odd(tensor) and which in ("device", "is_cuda", "is_cpu"):
            there = self._there(tensor)
            return {"device": GPU if there else torch.device("cpu"), "is_cuda": there, "is_cpu": not there}[
                which
            ]
        found = func(*args)
        if which == "grad" and found is not None and on_gpu(found) is None:
            claim(found, self._there(tensor))
        return found

    def _moved(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        tensor, rest, target = args[0], list(args[1:]), None
        if name in ("cuda", "cpu"):
            target, rest, kwargs, func = name == "cuda", [tensor.dtype], {}, torch.Tensor.to
        for i, value in enumerate(rest):
            if isinstance(value, Tensor):
                target, rest[i] = self._there(value), value.dtype
            elif isinstance(value, (str, torch.device)) or (type(value) is int and i == 0):
                target = is_gpu(value)
                rest[i] = torch.device("cpu") if target else value
        if kwargs.get("device") is not None:
            target = is_gpu(kwargs["device"])
            kwargs["device"] = torch.device("cpu") if target else kwargs["device"]
        found = func(tensor, *rest, **kwargs)
        if _odd(tensor) or _odd(found):
            return found if _odd(found) or target is None else claim(found, target)
        target = self._there(tensor) if target is None else target
        same = found.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        if same and self._there(tensor) != target:
            found = found.clone()
        elif same:
            return found
        return claim(found, target)

    def _agree(self, name: str, args: Any, tensors: list[Tensor]) -> bool:
        """Where the tensors of an operation are; RuntimeError where they are not in one place."""
        if name in INDEXING:
            tensors = [t for t in (args[0], *args[2:]) if isinstance(t, Tensor)]
        if name in ANYWHERE:
            return bool(tensors) and self._there(tensors[0])
        large = {on_gpu(t) for t in tensors if t.ndim} - {None}
        if len(large) > 1:
            shapes = [(tuple(t.shape), "cuda" if on_gpu(t) else "cpu") for t in tensors]
            raise RuntimeError(f"{name}: tensors are not on the same device: {shapes}")
        if large:
            return large.pop()
        return any(on_gpu(t) for t in tensors) or (bool(tensors) and all(on_gpu(t) is None for t in tensors))


def _odd(tensor: Tensor) -> bool:
    """Without memory of its own."""
    return (
        tensor.device.type == "meta"
        or tensor.layout != torch.strided
        or not hasattr(tensor, "untyped_storage")
    )


class _Generators(type):
    def __instancecheck__(cls, found: Any) -> bool:
        return isinstance(found, REAL_GENERATOR)


REAL_GENERATOR = torch.Generator


class GPUGenerator(REAL_GENERATOR):
    """One that claims to be on the GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU


class Generator(metaclass=_Generators):
    """Takes the place of torch.Generator."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return GPUGenerator() if is_gpu(device) else REAL_GENERATOR(device)


@contextlib.contextmanager
def pretended_gpu():
    """The device "cuda" inside."""
    with contextlib.ExitStack() as stack:
        for name, value in {
            "synchronize": lambda *a: None, "get_device_name": lambda *a: "a pretended GPU",
            "get_device_capability": lambda *a: (8, 0), "mem_get_info": lambda *a: (2**34, 2**34),
            "max_memory_allocated": lambda *a: 0, "reset_peak_memory_stats": lambda *a: None,
            "current_device": lambda: 0, "is_bf16_supported": lambda *a, **k: False, "empty_cache": lambda: None,
            "get_rng_state": lambda *a: torch.get_rng_state(), "set_rng_state": lambda *a: None,
            "default_generators": (torch.default_generator,), "device_count": lambda: 1,
        }.items():  # fmt: skip
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(PretendGPU())
        yield
