"""The one exception that attar raises for its users."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class AttarError(Exception):
    """A request that cannot be carried out: says what is wrong, where, and what to do about it.

    The command line prints it as a single line and exits with code 1; the Python API raises it.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        message = what if where is None else f"{what} [{where}]"
        super().__init__(message if fix is None else f"{message}. {fix}")


def reason(error: Exception) -> str:
    """The first line of what an exception says, without the parts that AttarError shows itself."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0].rstrip(".")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, of a device or here, where torch says so in words alone."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def calling(pipe: Any) -> Iterator[None]:
    """What a pipeline raises inside, because of what it was called with or as its device failed, comes out as an
    AttarError."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
            raise AttarError(
                f"the device failed ({reason(error)})",
                where=type(pipe).__name__,
                fix="Run again; if it fails again, --device cpu tells whether it is the device",
            ) from error
        raise AttarError(
            f"the pipeline rejects its arguments ({reason(error)})",
            where=type(pipe).__name__,
            fix="Check the generation settings (generation.json) and the options",
        ) from error
