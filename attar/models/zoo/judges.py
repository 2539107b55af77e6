"""Judges of the built-in models: does a clip or a picture show what its sentence says?

The digit is read by a small convolutional network trained on handwriting that the generator never produced; colour,
direction and speed are measured from the pixels in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import AttarError
from attar.models.zoo.canvas import BACKGROUND, COLOURS
from attar.models.zoo.clips import SPEEDS, Scene, parse_prompt
from attar.models.zoo.pictures import Picture, parse_picture

CROP = 20  # side in pixels of the window around the ink that the reader sees


def ink_of(video: Tensor) -> Tensor:
    """Distance from the background, (B, F, 3, H, W) in [0, 1] -> (B, F, H, W); small compression noise is cut off."""
    ground = torch.tensor(BACKGROUND, device=video.device, dtype=video.dtype)[None, None, :, None, None]
    return ((video - ground).abs().amax(dim=2) - 0.12).clamp(min=0)


def centroids(ink: Tensor) -> Tensor:
    """Centre of mass in pixels, (B, F, H, W) -> (B, F, 2) as (x, y). Empty frames give the canvas' centre."""
    height, width = ink.shape[-2:]
    x = torch.arange(width, device=ink.device) + 0.5
    y = torch.arange(height, device=ink.device) + 0.5
    mass = ink.sum(dim=(-2, -1))
    centre = (
        torch.stack([(ink.sum(-2) * x).sum(-1), (ink.sum(-1) * y).sum(-1)], -1)
        / mass.clamp(min=1e-6)[..., None]
    )
    middle = torch.tensor([width / 2, height / 2], device=ink.device)
    return torch.where(mass[..., None] > 1e-3, centre, middle)


def measured_velocity(video: Tensor) -> Tensor:
    """Least-squares velocity of the ink in pixels per frame, (B, F, 3, H, W) -> (B, 2) as (x, y)."""
    track = centroids(ink_of(video))
    time = torch.arange(track.shape[1], device=video.device, dtype=track.dtype)
    time = time - time.mean()
    return (track * time[None, :, None]).sum(1) / time.square().sum()


def read_direction(velocity: Tensor) -> Tensor:
    """Nearest of the eight directions, (B, 2) -> (B,)."""
    angle = torch.atan2(-velocity[:, 1], velocity[:, 0])
    return (angle / (math.pi / 4)).round().long() % 8


def read_speed(velocity: Tensor) -> Tensor:
    """Nearest speed on a logarithmic scale, (B, 2) -> (B,)."""
    speeds = torch.tensor(list(SPEEDS.values()), device=velocity.device).log()
    return (velocity.norm(dim=-1).clamp(min=1e-3).log()[:, None] - speeds).abs().argmin(dim=-1)


def read_colour(video: Tensor) -> Tensor:
    """Nearest palette colour of the strongest ink, (B, F, 3, H, W) -> (B,)."""
    ink = ink_of(video)
    weight = (ink - 0.7 * ink.amax(dim=(1, 2, 3), keepdim=True)).clamp(min=0)[:, :, None]
    mean = (video * weight).sum(dim=(1, 3, 4)) / weight.sum(dim=(1, 3, 4)).clamp(min=1e-6)  # (B, 3)
    palette = torch.tensor(list(COLOURS.values()), device=video.device)
    return torch.cdist(mean.float(), palette).argmin(dim=-1)


def crops(video: Tensor) -> Tensor:
    """Windows centred on the ink, normalised to its peak: (B, F, 3, H, W) -> (B, F, CROP, CROP)."""
    ink = ink_of(video)
    batch, frames, height, width = ink.shape
    centre = centroids(ink).reshape(-1, 1, 1, 2)
    steps = torch.arange(CROP, device=video.device) + 0.5 - CROP / 2
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    where = (torch.stack([x, y], -1) + centre) / torch.tensor(
        [width / 2, height / 2], device=video.device
    ) - 1
    window = F.grid_sample(ink.reshape(-1, 1, height, width).float(), where.float(), align_corners=False)
    window = window / window.amax(dim=(-2, -1), keepdim=True).clamp(min=0.05)
    return window.reshape(batch, frames, CROP, CROP)


class DigitReader(nn.Module):
    """Reads the digit in windows (N, CROP, CROP) -> logits (N, 10)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3),
        )  # fmt: skip
        self.head = nn.Linear(2 * width * (CROP // 4) ** 2, 10)

    def forward(self, windows: Tensor) -> Tensor:
        return self.head(self.features(windows[:, None] - 0.3))

    @torch.no_grad()
    def read(self, video: Tensor) -> Tensor:
        """Log-probabilities averaged over the frames, (B, F, 3, H, W) in [0, 1] -> (B, 10)."""
        windows = crops(video)
        logits = self(windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
        return logits.log_softmax(dim=-1).mean(dim=1)

    @torch.no_grad()
    def describe(self, video: Tensor) -> Tensor:
        """What it sees in each frame, averaged over places: (B, F, 3, H, W) in [0, 1] -> (B · F, channels)."""
        features = self.features(crops(video).flatten(0, 1)[:, None] - 0.3)
        return features.unflatten(1, (-1, (CROP // 4) ** 2)).mean(2)

    @classmethod
    def load(cls, folder: str | Path) -> DigitReader:
        """The trained reader of a zoo folder. Raises AttarError when its file is missing."""
        path = Path(folder) / "judge" / "digit_reader.safetensors"
        if not path.is_file():
            raise AttarError(
                "the digit reader is missing", where=str(path), fix="use the folder of a built-in model"
            )
        reader = cls()
        reader.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
        )
        return reader.eval()


@dataclass(frozen=True)
class PictureVerdict:
    """Which parts of the sentence the picture shows."""

    digit: bool
    colour: bool

    def as_dict(self) -> dict[str, bool]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """Which parts of the sentence the clip shows."""

    digit: bool
    colour: bool
    direction: bool
    speed: bool

    def as_dict(self) -> dict[str, bool]:
        return asdict(self)


def judge(video: Tensor, scenes: list[Scene], reader: DigitReader) -> list[Verdict]:
    """Compare clips with their sentences. video: (B, F, 3, H, W) in [0, 1], one scene for each clip."""
    if len(scenes) != video.shape[0]:
        raise AttarError(f"{video.shape[0]} clips but {len(scenes)} scenes", where="judge")
    motion = measured_velocity(video)
    read = (reader.read(video).argmax(-1), read_colour(video), read_direction(motion), read_speed(motion))
    return [
        Verdict(d == s.digit, c == s.colour, r == s.direction, p == s.speed)
        for s, d, c, r, p in zip(scenes, *(part.tolist() for part in read), strict=True)
    ]


def judge_pictures(pictures: Tensor, wanted: list[Picture], reader: DigitReader) -> list[PictureVerdict]:
    """Compare pictures with what was asked for. pictures: (B, 3, H, W) in [0, 1], one wanted for each."""
    if len(wanted) != pictures.shape[0]:
        raise AttarError(f"{pictures.shape[0]} pictures but {len(wanted)} wanted", where="judge_pictures")
    frames = pictures[:, None]
    read = reader.read(frames).argmax(-1).tolist(), read_colour(frames).tolist()
    return [PictureVerdict(d == w.digit, c == w.colour) for w, d, c in zip(wanted, *read, strict=True)]


def verdicts(videos: Tensor, prompts: Sequence[str], reader: DigitReader) -> list[dict[str, bool]] | None:
    """What the judges see in videos (B, F, 3, H, W), or in images as videos of one frame, by attribute.

    None when a prompt is in no built-in model's words, or asks for the other kind.
    """
    if videos.shape[1] == 1:
        pictures = [picture for picture in map(parse_picture, prompts) if picture is not None]
        found = judge_pictures(videos[:, 0], pictures, reader) if len(pictures) == len(prompts) else None
    else:
        scenes = [scene for scene in map(parse_prompt, prompts) if scene is not None]
        found = judge(videos, scenes, reader) if len(scenes) == len(prompts) else None
    return None if found is None else [verdict.as_dict() for verdict in found]
