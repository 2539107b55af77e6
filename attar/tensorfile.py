"""safetensors files read and written tensor by tensor.

The usual reader maps a file into memory, and what was read of it counts as this process's memory until the file is
closed; the usual writer wants all tensors at once. Here a tensor is read into memory of its own, and a file is
written in any order, so that neither ever takes more than the tensors that somebody holds.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from attar.errors import AttarError

# in the order in which safetensors lays tensors out, from the end of this table: large elements first, so all aligned
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
_RANKS = {dtype: -rank for rank, dtype in enumerate(DTYPES.values())}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_AGAIN = "Copy or download it again"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file (`offset` in bytes from the start) and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """One safetensors file, of which only the header is held. Raises AttarError for a damaged or unknown one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > path.stat().st_size - 8:
                    raise ValueError("its header is longer than the file")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self.entries = {
                name: Entry(DTYPES[at["dtype"]], tuple(at["shape"]), 8 + length + at["data_offsets"][0])
                for name, at in header.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise self._damaged(f"{error}") from error
        if any(at.offset + at.nbytes > path.stat().st_size for at in self.entries.values()):
            raise self._damaged("tensor data is missing")

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        return self._part(name, 0, self.entries[name].nbytes).view(self.entries[name].dtype).reshape(
            self.entries[name].shape
        )  # fmt: skip

    def ends(self, name: str, size: int) -> tuple[bytes, bytes]:
        """The first and the last `size` bytes of the tensor, or all of it twice where it is smaller."""
        count = self.entries[name].nbytes
        first = self._part(name, 0, min(size, count))
        last = self._part(name, max(0, count - size), min(size, count))
        return first.numpy().tobytes(), last.numpy().tobytes()

    def _part(self, name: str, start: int, count: int) -> Tensor:
        buffer = torch.empty(count, dtype=torch.uint8)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.entries[name].offset + start)
                view, done = buffer.numpy().data, 0
                while done < count:  # one call reads 2 GiB at most
                    got = file.readinto(view[done:])
                    if not got:
                        raise self._damaged("tensor data is missing")
                    done += got
        except OSError as error:
            raise self._damaged(f"{error}") from error
        return buffer

    def _damaged(self, why: str) -> AttarError:
        return AttarError(
            f"the weight file is damaged or incomplete ({why})",
            where=f"{self.path.parent.name}/{self.path.name}",
            fix=_AGAIN,
        )


class TensorWriter:
    """Writes one safetensors file whose tensors come in any order, laid out as safetensors does it.

    tensors: name -> (dtype, shape). metadata: texts for the header; `finish` may replace them by others of the same
    length, such as checksums that are known only when everything was written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        order = sorted(tensors, key=lambda name: (_RANKS[tensors[name][0]], name))
        self.path, self._order, self._file = path, order, None
        self._places: dict[str, Entry] = {}
        offset = 0
        for name in order:
            self._places[name] = Entry(*tensors[name], offset)
            offset += self._places[name].nbytes
        self._size = offset
        self._start = 8 + len(self._header(metadata))
        self._missing = set(order)

    def __enter__(self) -> TensorWriter:
        self._file: BinaryIO | None = open(self.path, "wb")
        self._file.truncate(self._start + self._size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts one tensor in its place. It must be what was announced."""
        place = self._places[name]
        assert self._file is not None and name in self._missing
        assert (tensor.dtype, tuple(tensor.shape)) == (place.dtype, place.shape), name
        self._file.seek(self._start + place.offset)
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._missing.remove(name)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the header, once every tensor is there."""
        assert self._file is not None and not self._missing, sorted(self._missing)[:3]
        header = self._header(metadata)
        assert 8 + len(header) == self._start
        self._file.seek(0)
        self._file.write(struct.pack("<Q", len(header)) + header)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        for name in self._order:
            place = self._places[name]
            ends = [place.offset, place.offset + place.nbytes]
            content[name] = {"dtype": _CODES[place.dtype], "shape": list(place.shape), "data_offsets": ends}
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        return text.ljust(-(-len(text) // 8) * 8)
