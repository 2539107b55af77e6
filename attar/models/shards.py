"""The stored tensors of one component of a diffusers folder, in one safetensors file or in several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from attar.errors import AttarError
from attar.tensorfile import Entry, TensorFile

# as diffusers and transformers name them; a file of another name beside these is a variant that was not asked for
STEMS = ("diffusion_pytorch_model", "model")


class Shards:
    """Reads tensors by name; between two reads nothing but the headers is in memory.

    A folder without safetensors files has no tensors. Raises AttarError for files that are damaged or missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, TensorFile] = {}
        for path in weight_files(folder):
            file = TensorFile(path)
            self._files.update(dict.fromkeys(file.entries, file))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def entry(self, name: str) -> Entry:
        """Type and shape of a tensor."""
        return self._files[name].entries[name]

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """The tensor in memory of its own; one of floating point in `dtype`, as from_pretrained casts it."""
        tensor = self._files[name].read(name)
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    def ends(self, name: str, size: int) -> tuple[bytes, bytes]:
        """The first and last `size` bytes of a tensor."""
        return self._files[name].ends(name, size)

    def values(self) -> int:
        """How many numbers the component has."""
        return sum(self.entry(name).nbytes // self.entry(name).dtype.itemsize for name in self)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component that are loaded where no variant is asked for; none where it has others."""
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                return [folder / name for name in names]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise AttarError(
                    "the index of the shards is damaged",
                    where=f"{folder.name}/{index.name}",
                    fix="Copy or download it again",
                ) from error
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    return []
