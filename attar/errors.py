"""The one exception that attar raises for its users."""

from __future__ import annotations


class AttarError(Exception):
    """A request that cannot be carried out: says what is wrong, where, and what to do about it.

    The command line prints it as a single line and exits with code 1; the Python API raises it.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        message = what if where is None else f"{what} [{where}]"
        super().__init__(message if fix is None else f"{message}. {fix}")
