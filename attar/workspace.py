"""The folder in which one compression lives: every finished piece is on disk, whole or not at all.

    job.json                              what is being done; another job in the same folder is refused
    trace/prompt-0000.safetensors …       traced generations
    <component>/selection.json            score table and chosen samples
    <component>/boundary-003.safetensors  streams that enter block 3, for the block that is made next
    <component>/block-003.safetensors     packed layers of block 3 with its result in the header

A killed run is started again with the same arguments: finished pieces are read, the rest is made. On one machine
with one seed and thread count the result has the same bytes as that of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attar import ranks
from attar.errors import AttarError, reason
from attar.files import check_writable, passing, writing
from attar.memory import hold

FORMAT = 1
LOCK = ".lock"


class Workspace:
    """Atomic, validated files in one folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._lock: IO[bytes] | None = None
        if self.folder.exists() and not self.folder.is_dir():
            raise AttarError("the workspace is a file", where=str(folder), fix="Name a folder")

    def claim(self, job: Mapping[str, Any]) -> None:
        """Begin or continue a job; the folder is ours until `release`, or until the process ends.

        Of the processes of one job the first claims it for all. Raises AttarError if the folder holds another job or
        foreign files, if a process of another run works in it, or if not all processes of this one see it.
        """
        if ranks.is_first():
            self._claim({"format": FORMAT, **json.loads(json.dumps(job))})
        ranks.barrier()
        if not self.has("job.json"):
            raise AttarError(
                "a process of this job does not see the workspace",
                where=str(self.folder),
                fix="Put it on a file system that all machines of the job share",
            )

    def _claim(self, content: dict[str, Any]) -> None:
        check_writable(self.folder)
        if not (self.folder / "job.json").is_file() and self._foreign():
            raise AttarError(
                "the folder is not empty and holds no attar job",
                where=str(self.folder),
                fix="Name an empty or new folder as the workspace",
            )
        self._take_lock()
        try:
            self._check_job(content)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Lets another process work here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

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

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], meta: Any = None, *, kept: bool = True
    ) -> None:
        """Tensors with a JSON-able description, as one safetensors file with a checksum of its content.

        kept: False for a file that no other run will read.
        """
        stored = _apart(tensors)
        text = json.dumps(meta)
        # one entry, since safetensors writes several in a random order
        header = {"attar": json.dumps({"meta": text, "sha256": _digest(stored, text)})}
        with (writing if kept else passing)(self.folder / name) as path:
            save_file(stored, path, metadata=header)

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """(tensors, description), or None if there is no such file. Raises AttarError if it is damaged."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["attar"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            text = header["meta"]
            if header["sha256"] != _digest(tensors, text):
                raise ValueError("checksum mismatch")
            return tensors, json.loads(text)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise AttarError(
                f"the file is damaged ({reason(error)})", where=str(path), fix="Delete it and run again"
            ) from error

    def hold(self, streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The streams on the CPU, in files of the folder where memory is getting short (`memory.hold`)."""
        return {name: hold(stream, self.folder) for name, stream in streams.items()}

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def _check_job(self, content: dict[str, Any]) -> None:
        known = self.read_json("job.json")
        if known is not None and known != content:
            known = known if isinstance(known, dict) else {}
            different = sorted(k for k in {**known, **content} if known.get(k) != content.get(k))
            raise AttarError(
                f"the workspace holds another job (different: {', '.join(different)})",
                where=str(self.folder),
                fix="Repeat its arguments to go on with it, or use another --workspace",
            )
        for pattern in (".*.tmp", ".tmp*"):  # left by killed runs; the latter are safetensors' own
            for path in self.folder.rglob(pattern):
                path.unlink(missing_ok=True)
        if known is None:
            self.write_json("job.json", content)

    def _foreign(self) -> bool:
        """Whether the folder holds anything else than what a run leaves that was killed before its first file."""
        if not self.folder.is_dir():
            return False
        return any(p.name != LOCK and not p.match(".job.json.*.tmp") for p in self.folder.iterdir())

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no POSIX: two runs in one folder are not noticed there
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / LOCK, "wb")  # noqa: SIM115 - open until released
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise AttarError(
                "another process works in the workspace",
                where=str(self.folder),
                fix="Wait for it, or use another one",
            ) from error
        except OSError:  # a filesystem without locks
            self.release()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, no two of them in the same memory, as safetensors wants them."""
    kept: dict[str, Tensor] = {}
    taken = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        kept[name] = tensor
    return kept


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
