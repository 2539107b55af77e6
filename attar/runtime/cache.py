"""The folder for what is worth keeping between runs: compiled kernels, and how kernels run best on a device."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$ATTAR_CACHE, else `attar` in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("ATTAR_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "attar"
