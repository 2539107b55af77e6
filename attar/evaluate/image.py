"""Images out: PNG files with the settings that made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from attar.errors import AttarError
from attar.files import writing


def save_image(
    frame: np.ndarray, path: str | Path, upscale: int = 1, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a frame (H, W, 3) uint8 as PNG, whole or not at all.

    `upscale` repeats each pixel that many times in both directions. `metadata` (prompt, seed, steps, …) is kept as JSON
    in the file's comment; `read_image_metadata` gives it back.
    Raises AttarError for a frame of another kind, another suffix, and a file that cannot be written.
    """
    path, frame = Path(path), np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise AttarError(
            f"an image is (H, W, 3) uint8, not {frame.shape} {frame.dtype}", fix="Use to_frames first"
        )
    if upscale < 1 or path.suffix != ".png":
        raise AttarError(
            f"cannot write an image with upscale={upscale}, suffix {path.suffix!r}",
            where=str(path),
            fix="Take upscale of 1 or more, and a name that ends in .png",
        )
    info = PngInfo()
    if metadata:
        info.add_itxt("Comment", json.dumps(dict(metadata), ensure_ascii=False))
    with writing(path) as temporary:
        image = Image.fromarray(frame.repeat(upscale, axis=0).repeat(upscale, axis=1))
        image.save(temporary, format="PNG", pnginfo=info)
    return path


def read_image_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_image` was given as `metadata`; an empty dict for an image without it."""
    try:
        with Image.open(path) as image:
            comment = image.info.get("Comment")
    except FileNotFoundError as error:
        raise AttarError("no such image", where=str(path), fix="Check the path") from error
    except (UnidentifiedImageError, OSError) as error:
        raise AttarError("not a readable image", where=str(path), fix="Generate it again") from error
    try:
        content = json.loads(comment or "")
    except ValueError:
        return {}  # a comment by someone else
    return content if isinstance(content, dict) else {}
