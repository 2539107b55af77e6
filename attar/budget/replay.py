"""One run of a block, most of which is taken from an earlier one: what comes before a layer does not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

KEPT = 2**30  # bytes of results at most


def _given(place: int, name: str, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    return args[place] if len(args) > place else kwargs[name]


def _rows(args: tuple, kwargs: Mapping[str, Any]) -> int:
    return _given(0, "input", args, kwargs).shape[-1]


def _keys(args: tuple, kwargs: Mapping[str, Any]) -> int:
    return 2 * _given(1, "key", args, kwargs).shape[-2]


def _window(args: tuple, kwargs: Mapping[str, Any]) -> int:
    return _given(1, "weight", args, kwargs)[0].numel()


# what is worth keeping -> multiplications for each number of the result; the rest is computed again
HEAVY: dict[Any, Callable[[tuple, Mapping[str, Any]], int]] = {
    F.linear: _rows, torch.matmul: _rows, torch.bmm: _rows, Tensor.matmul: _rows,
    F.scaled_dot_product_attention: _keys,
    F.conv1d: _window, F.conv2d: _window, F.conv3d: _window,
}  # fmt: skip


@dataclass
class _Result:
    value: Tensor | None  # None when it is not kept
    version: int = 0
    worth: int = 0


class Replay:
    """Keeps what products, convolutions and attentions gave in one run, and gives it again in other runs of the same
    call, up to a layer that has been exchanged. The same numbers, bit for bit.

    Inside `recorded()` the block runs once, with its own layers, without gradients; inside `until(name)` it runs again,
    with another layer in the place of that one. layers: by name, those that may be exchanged. limit: bytes that are
    kept; above it results go whose numbers took least to compute. Not kept are a result that is written to later in the
    run (by an operation that torch counts: not through `.data` or NumPy) and one that is written into a given tensor;
    nor is anything behind the first place where a layer's own parameters are used, whether or not it is called there.
    """

    def __init__(self, layers: Mapping[str, nn.Module], limit: int = KEPT) -> None:
        self.layers, self.limit = layers, limit
        self._results: list[_Result] = []
        self._starts: dict[str, int] = {}  # how many results there are when a layer is called first

    @property
    def kept(self) -> int:
        """Bytes of the results that are kept."""
        return sum(r.value.nbytes for r in self._results if r.value is not None)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Forgets the run before."""
        self._results, self._starts = [], {}

        def enter(name: str) -> Callable[..., None]:
            def called(*_: Any) -> None:  # a hook's result would take the place of the input
                self._starts.setdefault(name, len(self._results))

            return called

        owners = {id(p): name for name, layer in self.layers.items() for p in layer.parameters()}

        def keep(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            for given in (*args, *kwargs.values()):
                if isinstance(given, Tensor):
                    for tensor in (given, given._base):  # itself, or a view of it
                        if id(tensor) in owners:
                            self._starts.setdefault(owners[id(tensor)], len(self._results))
            result = func(*args, **kwargs)
            self._results.append(_Result(result, result._version, HEAVY[func](args, kwargs)))
            self._let_go()
            return result

        handles = [layer.register_forward_pre_hook(enter(name)) for name, layer in self.layers.items()]
        try:
            with _Heavy(keep):
                yield
        finally:
            for handle in handles:
                handle.remove()
        for result in self._results:
            if result.value is not None and result.value._version != result.version:
                result.value = None

    @contextmanager
    def until(self, name: str) -> Iterator[None]:
        """The run inside takes what is kept from before the first call of this layer."""
        results = iter(self._results[: self._starts.get(name, 0)])

        def give(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            known = next(results, None)
            return func(*args, **kwargs) if known is None or known.value is None else known.value

        with _Heavy(give):
            yield

    def _let_go(self) -> None:
        while self.kept > self.limit:
            least = min((r for r in self._results if r.value is not None), key=lambda r: r.worth)
            least.value = None


class _Heavy(TorchFunctionMode):
    """Hands every call of a heavy function to `instead`."""

    def __init__(self, instead: Callable[[Any, tuple, dict[str, Any]], Any]) -> None:
        super().__init__()
        self.instead = instead

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in HEAVY and (kwargs or {}).get("out") is None:
            return self.instead(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
