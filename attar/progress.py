"""Progress as the conductor reports it; what it looks like is decided by the one who shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[..., None]  # advance(done, note="")


class Progress(Protocol):
    """Shows tasks. `task` gives a function that is called with the work done so far, and a short note."""

    def task(self, name: str, total: float) -> AbstractContextManager[Advance]: ...


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Advance]:
        yield lambda done, note="": None


class RichProgress:
    """A bar for each task on stderr, with the time that is left, and a line for every finished one."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Advance]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<24}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console, refresh_per_second=4) as bars:
            task = bars.add_task(name, total=total, note="")

            def advance(done: float, note: str = "") -> None:
                if (
                    "→" in note and not self.console.is_terminal
                ):  # a log file gets one line for each finished block
                    self.console.print(f"{name}: {note}", highlight=False)
                elif "→" in note:
                    bars.console.print(f"  {note}", highlight=False)
                bars.update(task, completed=done, note=note)

            yield advance
            bars.update(task, completed=total, note="")
