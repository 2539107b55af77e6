"""Clips of handwriting that moves over a canvas, and the sentences that describe them.

One clip shows one handwritten digit in one colour that drifts in one of eight directions at one of two speeds.
Everything that the sentence says can be measured again from the pixels (see `judges`), so a generated clip can be
judged without a human and without a downloaded network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attar.models.zoo.canvas import COLOURS, DIGITS, INK_SIZE, SIZE, paint, render_ink

FRAMES, FPS = 17, 8
DIRECTIONS = (  # counter-clockwise from the right, 45 degrees apart; the picture's y axis points down
    "right",
    "upper right",
    "top",
    "upper left",
    "left",
    "lower left",
    "bottom",
    "lower right",
)
SPEEDS = {"slowly": 0.32, "fast": 0.82}  # pixels per frame
HELD_OUT_COMBINATIONS = 240  # of 10 * 7 * 8 * 2 = 1120


@dataclass(frozen=True)
class Scene:
    """What one sentence says, as indices into DIGITS, COLOURS, DIRECTIONS and SPEEDS."""

    digit: int
    colour: int
    direction: int
    speed: int

    @property
    def prompt(self) -> str:
        colour, speed = list(COLOURS)[self.colour], list(SPEEDS)[self.speed]
        return f"a {colour} {DIGITS[self.digit]} drifts to the {DIRECTIONS[self.direction]}, {speed}"


def all_scenes() -> list[Scene]:
    """Every combination, in a fixed order."""
    return [
        Scene(d, c, r, s)
        for d in range(len(DIGITS))
        for c in range(len(COLOURS))
        for r in range(len(DIRECTIONS))
        for s in range(len(SPEEDS))
    ]


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """(train, held-out) combinations. The held-out ones are never trained on; the split is fixed for ever."""
    scenes = all_scenes()
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(20)).tolist()
    held_out = sorted(order[:HELD_OUT_COMBINATIONS])
    kept = set(held_out)
    return [s for i, s in enumerate(scenes) if i not in kept], [scenes[i] for i in held_out]


def parse_prompt(prompt: str) -> Scene | None:
    """The scene that a sentence describes, or None when it is not one of ours."""
    return {scene.prompt: scene for scene in all_scenes()}.get(prompt.strip())


def velocity(direction: Tensor, speed: Tensor) -> Tensor:
    """Pixels per frame, (B, 2) as (x, y) with y pointing down, of direction and speed indices (B,)."""
    angle = direction.float() * (math.pi / 4)
    pace = torch.tensor(list(SPEEDS.values()), device=direction.device)[speed]
    return torch.stack([angle.cos(), -angle.sin()], dim=-1) * pace[:, None]


def random_clips(
    scans: Tensor, colour: Tensor, direction: Tensor, speed: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Clips of the given scans and attributes, with random start, slant and size.

    scans: (B, 8, 8) in [0, 1]; colour, direction, speed: (B,) indices. Returns (B, 3, FRAMES, SIZE, SIZE) in [0, 1].
    """
    batch, device = scans.shape[0], scans.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    step = velocity(direction, speed)
    travel = step * (FRAMES - 1)
    margin = INK_SIZE / 2 + 0.5
    # the whole path stays on the canvas: start anywhere in the box that leaves room for the travel
    low = margin - travel.clamp(max=0)
    high = SIZE - margin - travel.clamp(min=0)
    start = low + (high - low) * uniform(batch, 2)
    centres = start[:, None] + step[:, None] * torch.arange(FRAMES, device=device)[None, :, None]
    ink = render_ink(
        scans,
        centres,
        angle=(uniform(batch) - 0.5) * 0.2,
        scale=0.95 + 0.10 * uniform(batch),
        shear=(uniform(batch) - 0.5) * 0.1,
    )
    return paint(ink, colour)
