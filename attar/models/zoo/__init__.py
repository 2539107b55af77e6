"""Small models of the real architecture classes that come with attar."""

from __future__ import annotations

from pathlib import Path

_FOLDERS = {"digits-video": "digits-video"}


def zoo_names() -> list[str]:
    """Names that can be used wherever a model is asked for."""
    return list(_FOLDERS)


def zoo_folder(name: str) -> Path:
    """The diffusers folder of a built-in model."""
    return Path(__file__).parent / _FOLDERS[name]
