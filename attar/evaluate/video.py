"""Videos in and out: mp4 files with the settings that made them, contact sheets, data URIs."""

from __future__ import annotations

import base64
import errno
import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from attar.errors import AttarError
from attar.files import is_full, writing

# Tagged BT.709, so that every player turns the colours back in the same way.
_COLOUR = ["-color_primaries", "bt709", "-color_trc", "bt709", "-colorspace", "bt709"]


def to_frames(videos: Tensor) -> np.ndarray:
    """Float videos (B, F, C, H, W) in [0, 1] -> uint8 frames (B, F, H, W, 3), rounded. C is 3 or 1."""
    if videos.ndim != 5 or videos.shape[2] not in (1, 3):
        raise AttarError(f"videos must be (B, F, C, H, W) with 1 or 3 channels, not {tuple(videos.shape)}")
    frames = (videos.detach().float().clamp(0, 1) * 255).round().byte().movedim(2, -1)
    return frames.expand(*frames.shape[:-1], 3).cpu().numpy()


def save_video(
    frames: np.ndarray,
    path: str | Path,
    fps: float,
    upscale: int = 1,
    metadata: Mapping[str, Any] | None = None,
    crf: int = 12,
) -> Path:
    """Write frames as mp4 (H.264, yuv420p), whole or not at all.

    frames: (F, H, W, 3) uint8. `upscale` repeats each pixel that many times in both directions: with 2 or
    more, small videos keep their colours through the halved chroma of yuv420p. An odd height or width is
    padded by repeating its last line, since the format has none. `metadata` (prompt, seed, steps, …) is
    kept as JSON in the file's comment; `read_metadata` gives it back. `crf` is x264's quality, 0 the best.
    Raises AttarError for frames of another kind, impossible settings, and a file that cannot be written.
    """
    path = Path(path)
    frames = _checked(frames)
    if not 0 < fps < math.inf or upscale < 1 or path.suffix != ".mp4":
        raise AttarError(
            f"cannot write a video with fps={fps}, upscale={upscale}, suffix {path.suffix!r}",
            where=str(path),
            fix="Take fps above 0, upscale of 1 or more, and a name that ends in .mp4",
        )
    frames = frames.repeat(upscale, axis=1).repeat(upscale, axis=2)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{frames.shape[2]}x{frames.shape[1]}"]
    codec = ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(crf), "-bf", "0"]
    colours = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", *_COLOUR]
    flags = ["-movflags", "+faststart", "-fflags", "+bitexact", "-flags:v", "+bitexact"]
    comment = ["-metadata", f"comment={json.dumps(dict(metadata), ensure_ascii=False)}"] if metadata else []
    with writing(path) as temporary:
        output = [*codec, *colours, *flags, *comment, "-f", "mp4", "-y", str(temporary)]
        _ffmpeg([*raw, "-r", repr(float(fps)), "-i", "-", *output], frames)
    return path


def load_video(path: str | Path) -> tuple[np.ndarray, float]:
    """Read a video as (frames (F, H, W, 3) uint8, fps). Raises AttarError if it cannot be read."""
    if not Path(path).is_file():
        raise AttarError("no such video", where=str(path), fix="Check the path")
    try:
        reader = imageio_ffmpeg.read_frames(str(path))
        info = reader.__next__()
        width, height = info["size"]
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    except (OSError, RuntimeError, ValueError, KeyError, StopIteration) as error:
        raise AttarError("not a readable video", where=str(path), fix="Generate it again") from error
    if not frames:
        raise AttarError("the video has no frames", where=str(path), fix="Generate it again")
    return np.stack(frames), float(info["fps"])


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_video` was given as `metadata`; an empty dict for a video without it."""
    if not Path(path).is_file():
        raise AttarError("no such video", where=str(path), fix="Check the path")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    answer = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if answer.returncode != 0:
        raise AttarError("not a readable video", where=str(path), fix="Generate it again")
    comment = answer.stdout.partition("\ncomment=")[2]
    text, escaped = "", False
    for character in comment:  # a backslash protects = ; # \ and newline; a bare newline ends the value
        if character == "\n" and not escaped:
            break
        escaped = character == "\\" and not escaped
        text += "" if escaped else character
    try:
        content = json.loads(text)
    except ValueError:
        return {}  # a comment by someone else
    return content if isinstance(content, dict) else {}


def contact_sheet(
    videos: Sequence[np.ndarray], labels: Sequence[str], frames: int = 6, upscale: int = 1
) -> Image.Image:
    """One picture for a README: a labelled row for each video, with frames evenly spaced from first to last.

    videos: each (F, H, W, 3) uint8, all of one height and width. Raises AttarError for no videos, unequal
    sizes, and another number of labels.
    """
    if len(videos) == 0 or len(videos) != len(labels):
        raise AttarError(f"{len(videos)} videos and {len(labels)} labels make no contact sheet")
    checked = [_checked(video) for video in videos]
    if len({video.shape[1:] for video in checked}) > 1:
        raise AttarError("the videos of a contact sheet must have one size")
    gap, font = 4, ImageFont.load_default(size=13)
    height, width = (side * upscale for side in checked[0].shape[1:3])
    columns = min(frames, max(len(video) for video in checked))
    band = 13 + 2 * gap
    text_width = max(int(font.getlength(label)) for label in labels) + 2 * gap
    size = (max(gap + columns * (width + gap), text_width), len(checked) * (band + height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, (video, label) in enumerate(zip(checked, labels, strict=True)):
        top = row * (band + height + gap) + gap
        draw.text((gap, top), label, fill="black", font=font)
        for column, index in enumerate(np.linspace(0, len(video) - 1, columns).round().astype(int)):
            frame = Image.fromarray(video[index]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(frame, (gap + column * (width + gap), top + band - gap))
    return sheet


def media_type(start: bytes) -> str | None:
    """The MIME type of an mp4 or PNG file by its first 8 bytes; an mp4 begins with an `ftyp` box. None for others."""
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    return "video/mp4" if start[4:8] == b"ftyp" else None


def to_data_uri(source: str | Path | bytes, mime: str | None = None) -> str:
    """The content of a file, or bytes, as a base64 data URI. mime: what it is, told by its first bytes if not given."""
    if not isinstance(source, bytes):
        try:
            source = Path(source).read_bytes()
        except OSError as error:
            raise AttarError(f"cannot read the file: {error.strerror}", where=str(source)) from error
    mime = mime or media_type(source) or "video/mp4"
    return f"data:{mime};base64,{base64.b64encode(source).decode('ascii')}"


def _ffmpeg(arguments: Sequence[str], frames: np.ndarray) -> None:
    """Runs ffmpeg with the frames as its input. Raises OSError with its own words when it fails."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *arguments]
    pixels = np.ascontiguousarray(frames).reshape(-1).data
    answer = subprocess.run(command, input=pixels, capture_output=True, check=False)
    if answer.returncode != 0:
        said = answer.stderr.decode(errors="replace").strip() or f"ffmpeg ended with {answer.returncode}"
        full = is_full(OSError(said))  # its last words are seldom about the cause
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else OSError(said.splitlines()[-1])


def _checked(frames: np.ndarray) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or frames.size == 0:
        raise AttarError(
            f"frames must be (F, H, W, 3) uint8, not {frames.shape} {frames.dtype}", fix="Use to_frames first"
        )
    return frames
