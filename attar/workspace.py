"""The folder in which one compression lives: every finished piece is on disk, whole or not at all.

    job.json                     what is being done (fingerprint); another job in the same folder is refused
    trace/prompt-0000.safetensors …
    <component>/selection.json   score table and chosen samples
    <component>/segment-000.safetensors   full-precision inputs of the first block of a segment
    <component>/boundary-003.safetensors  streams that enter block 3
    <component>/block-003.safetensors     packed layers of block 3 with its result in the header

A killed run is started again with the same arguments: finished pieces are read, the rest is made. On one machine
with one seed and thread count the result has the same bytes as that of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attar.errors import AttarError

FORMAT = 1


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it on success. Raises AttarError when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full:
            raise AttarError(
                "the disk is full", where=str(path), fix="Free some space and run the same command again; it goes on"
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


class Workspace:
    """Atomic, validated files in one folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise AttarError("the workspace is a file", where=str(folder), fix="Name a folder")

    def claim(self, job: Mapping[str, Any]) -> None:
        """Begin or continue a job. Raises AttarError if the folder holds another one."""
        self._remove_leftovers()
        known = self.read_json("job.json")
        content = {"format": FORMAT, **json.loads(json.dumps(job))}
        if known is None:
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise AttarError(
                    "the folder is not empty and holds no attar job",
                    where=str(self.folder),
                    fix="Name an empty or new folder as the workspace",
                )
            self.write_json("job.json", content)
        elif known != content:
            different = sorted(k for k in {**known, **content} if known.get(k) != content.get(k))
            raise AttarError(
                f"the workspace holds another job (different: {', '.join(different)})",
                where=str(self.folder),
                fix="Repeat its arguments to go on with it, or use another --workspace",
            )

    def write_json(self, name: str, content: Any) -> None:
        with writing(self.folder / name) as path:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def read_json(self, name: str) -> Any:
        """The content of a file, or None if there is none. Raises AttarError if it is damaged."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise AttarError("the file is damaged", where=str(path), fix="Delete it and run again") from error

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], meta: Any = None) -> None:
        """Tensors with a JSON-able description, as one safetensors file with a checksum of its content."""
        contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        text = json.dumps(meta)
        header = {"meta": text, "sha256": _digest(contiguous, text)}
        with writing(self.folder / name) as path:
            save_file(contiguous, path, metadata=header)

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """(tensors, description), or None if there is no such file. Raises AttarError if it is damaged."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            text = header["meta"]
            if header["sha256"] != _digest(tensors, text):
                raise ValueError("checksum mismatch")
            return tensors, json.loads(text)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise AttarError(
                f"the file is damaged ({error})", where=str(path), fix="Delete it and run again"
            ) from error

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Temporary files of killed runs."""
        if self.folder.is_dir():
            for path in self.folder.rglob(".*.tmp"):
                path.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
