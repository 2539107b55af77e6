"""Files that appear whole under their name or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from attar.errors import AttarError, reason


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which it replaces at the end.

    Raises AttarError when the disk is full or the place cannot be written; nothing is left behind then, and what
    was under the name before is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise not_written(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    with contextlib.suppress(OSError):  # some filesystems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def passing(path: Path) -> Iterator[Path]:
    """`path` itself, for a file that this run alone reads: neither whole nor synced matters, so it costs less.

    Raises AttarError as `writing` does.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
    except (OSError, SafetensorError) as error:
        raise not_written(error, path) from error


def not_written(error: Exception, path: str | os.PathLike[str]) -> AttarError:
    """What a failed write means to the user. error: an OSError, or what safetensors makes of one."""
    if is_full(error):
        fix = "Free some space and run the same command again; it goes on"
        return AttarError("the disk is full", where=os.fspath(path), fix=fix)
    return AttarError(f"cannot be written ({reason(error)})", where=os.fspath(path), fix="Check the place")


def file_error(error: Exception) -> AttarError:
    """The same for an OSError of which no more is known than what it says itself."""
    path = getattr(error, "filename", None)
    if is_full(error):
        return not_written(error, path or "unknown file")
    return AttarError(reason(error), where=None if path is None else os.fsdecode(path))


def is_full(error: Exception) -> bool:
    """Whether there was no space for a file."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def named_path(text: str | os.PathLike[str]) -> Path:
    """The path that a user wrote. Raises AttarError for none, which would else mean the current folder."""
    if not os.fspath(text).strip():
        raise AttarError("a path is empty", fix="Name a file or folder; a dot is the current one")
    return Path(text)


def check_writable(folder: Path) -> None:
    """Raises AttarError if `folder` cannot be made, or nothing can be written into it."""
    place = Path(os.path.abspath(folder))
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise AttarError(
            "a file stands where a folder is needed", where=str(place), fix="Name another folder"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise AttarError(
            "the folder cannot be written",
            where=str(place),
            fix="Name another one, or change its permissions",
        )
