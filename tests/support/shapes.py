"""Real shapes, built and counted once for all tests. Nothing changes them."""

from __future__ import annotations

from functools import cache

from attar.forecast.architecture import Architecture, find_architecture
from attar.forecast.counts import Counts
from attar.forecast.plan import count_step, size_for

architecture = cache(find_architecture)


@cache
def counted(name: str, resolution: str | None = None, frames: int | None = None) -> Counts:
    """One forward of a shape's transformer, at its own size where none is given."""
    known: Architecture = architecture(name)
    (counts,) = count_step(known, size_for(known, resolution, frames, None)).values()
    return counts
