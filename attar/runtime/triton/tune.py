"""Which tile sizes a product runs with: measured once for a shape on a device, and kept on disk.

Every configuration gives the same integers, so the choice changes nothing but time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.errors import OutOfResources

from attar.errors import AttarError
from attar.files import writing
from attar.runtime.cache import cache_folder

_FORMAT = 2
_VARIABLE = "ATTAR_TRITON_TUNING"


@dataclass(frozen=True)
class Config:
    """Tile of a program: rows, outputs, and codes of a row in one step, all planes together; warps; loads in flight.

    group: tiles of rows that share the weights in the second-level cache. flatten: of dense_matmul.
    """

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    flatten: int = 0


class Problem(NamedTuple):
    """What a choice depends on beside the device. rows counts in powers of two: `bucket`."""

    kernel: str
    dtype: str
    bits: int
    rows: int
    outputs: int
    width: int
    groups: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


Run = Callable[[Config], object]


@functools.cache
def bucket(size: int) -> int:
    """The power of two at or above a size, at least 16: that of a tile for the tensor cores."""
    return 1 << max(4, (size - 1).bit_length())


class Tuner:
    """The choices for one device: those of earlier runs from its file, new ones by measuring."""

    def __init__(self, device: str, path: Path) -> None:
        self._header = {
            "format": _FORMAT,
            "device": device,
            "triton": triton.__version__,
            "kernels": _sources(),
        }
        self._path = path
        self._lock = threading.Lock()
        self._choices: dict[str, Config] | None = None
        self._known: dict[Problem, Config] = {}  # looked up at every call

    def choose(
        self,
        problem: Problem,
        candidates: Sequence[Config],
        run: Run,
        measure: Callable[[Run, Config], float],
    ) -> Config:
        """The configuration for a problem; where none is known, the candidate that `run` is fastest with.

        While a CUDA graph is captured nothing can be measured: the first candidate is used then, for this call only,
        and so it is with ATTAR_TRITON_TUNING=0. Candidates that do not fit into the device's shared memory are
        passed over, and so are those with more rows than the problem; AttarError when none fits.
        """
        known = self._known.get(problem)  # first, since it is all that most calls need
        if known is not None:
            return known
        candidates = fitting(problem, candidates)
        key = str(problem)
        if self._choices is None:
            self._choices = self._read()
        found = self._choices.get(key)
        if found is not None and found in candidates:
            self._known[problem] = found
            return found
        if os.environ.get(_VARIABLE) == "0" or _capturing():
            return candidates[0]
        with self._lock:
            self._choices[key] = _fastest(candidates, run, measure)
            self._write()
        self._known[problem] = self._choices[key]
        return self._known[problem]

    def _read(self) -> dict[str, Config]:
        """What the file holds, if it is whole and about this device and these kernels; else nothing."""
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            choices = content.pop("choices")
            if content != self._header:
                return {}
            return {key: Config(*(int(v) for v in values)) for key, values in choices.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}  # it will be measured again, and written anew

    def _write(self) -> None:
        self._choices = {**self._read(), **(self._choices or {})}  # another process may have measured too
        choices = {key: astuple(config) for key, config in sorted(self._choices.items())}
        content = json.dumps({**self._header, "choices": choices}, indent=1)
        # A cache that cannot be written costs the next process its measurements, and this one nothing.
        with contextlib.suppress(AttarError), writing(self._path) as temporary:
            temporary.write_text(content, encoding="utf-8")


def fitting(problem: Problem, candidates: Sequence[Config]) -> list[Config]:
    """Those with no more rows than the problem."""
    return [config for config in candidates if config.rows <= problem.rows]


_tuners: dict[str, Tuner] = {}


def choose(problem: Problem, candidates: Sequence[Config], run: Run, device: torch.device) -> Config:
    """The configuration for a problem on a device; equal GPUs share what was measured on one of them."""
    if device.type != "cuda":  # in the interpreter time means nothing
        return fitting(problem, candidates)[0]
    name = _device_name(device)
    if name not in _tuners:
        key = hashlib.sha256(f"{name}\0{triton.__version__}\0{_sources()}".encode()).hexdigest()[:24]
        _tuners[name] = Tuner(name, cache_folder() / f"triton-{key}.json")
    return _tuners[name].choose(problem, candidates, run, _milliseconds)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _milliseconds(run: Run, config: Config) -> float:
    """Median time of a run on the current device, with a cold second-level cache."""
    found: Any = triton.testing.do_bench(lambda: run(config), warmup=10, rep=40, return_mode="median")
    return found


def _fastest(candidates: Sequence[Config], run: Run, measure: Callable[[Run, Config], float]) -> Config:
    times: dict[Config, float] = {}
    _compile(candidates, run)
    for config in candidates:
        with contextlib.suppress(OutOfResources):
            times[config] = measure(run, config)
    if not times:
        raise AttarError(
            "no configuration of the triton kernels fits this device", fix="Use the backend 'reference'"
        )
    return min(times, key=lambda config: times[config])


def _compile(candidates: Sequence[Config], run: Run) -> None:
    """One run of each, side by side, since compiling takes far longer than measuring. What fails will fail again, in
    the thread that asked, when it is measured."""
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def once(config: Config) -> None:
        with torch.cuda.stream(stream), contextlib.suppress(Exception):
            if stream is not None:
                stream.synchronize()  # gives the thread the device's context, which descriptors of tensors need
            run(config)

    with ThreadPoolExecutor(min(len(candidates), os.cpu_count() or 1)) as pool:
        list(pool.map(once, candidates))


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _sources() -> str:
    """A digest of the kernels' sources: another kernel may run best in another way."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
