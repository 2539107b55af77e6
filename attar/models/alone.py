"""An autoencoder without a pipeline around it, as some are published: a folder of one config.json and its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import diffusers

NAME = "vae"  # of the only component, as pipelines call theirs


class Alone:
    """An autoencoder in the place of a pipeline, of which it is the only component."""

    def __init__(self, model: Any) -> None:
        self.vae = model
        self.components = {NAME: model}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """The model in the folder itself, as its class saves it."""
        self.vae.save_pretrained(folder)


def autoencoder_class(folder: Path) -> Any:
    """diffusers' class of the autoencoder that the folder holds by itself; None where it holds none."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    return found if hasattr(found, "encode") and hasattr(found, "decode") else None
