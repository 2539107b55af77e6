"""Handwriting drawn on a canvas: what the clips and the pictures of the built-in models have in common."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 32  # side of the canvas in pixels
BACKGROUND = (0.06, 0.07, 0.10)
INK_SIZE = 15.0  # side in pixels of the square that an 8x8 scan covers on the canvas

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (0.92, 0.20, 0.20),
    "green": (0.22, 0.80, 0.30),
    "blue": (0.28, 0.42, 1.00),
    "yellow": (0.96, 0.84, 0.22),
    "cyan": (0.22, 0.84, 0.88),
    "magenta": (0.88, 0.30, 0.86),
    "white": (0.94, 0.94, 0.94),
}


def render_ink(scans: Tensor, centres: Tensor, angle: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Draw 8x8 scans at sub-pixel positions.

    scans: (B, 8, 8) in [0, 1]; centres: (B, F, 2) in pixels (x, y); angle in radians, scale and shear: (B,).
    Returns ink (B, F, SIZE, SIZE) in [0, 1].
    """
    batch, frames = centres.shape[:2]
    up = F.interpolate(scans[:, None], size=(32, 32), mode="bicubic", align_corners=False)
    up = ((up - 0.12) / 0.6).clamp(0, 1)  # a firm stroke instead of the scan's grey halo
    grid = torch.arange(SIZE, device=scans.device) + 0.5
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    offset = torch.stack([x, y], dim=-1) - centres[:, :, None, None, :]  # (B, F, S, S, 2)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cos, sin + shear], -1), torch.stack([-sin, cos], -1)], -2)  # (B, 2, 2)
    half = (INK_SIZE / 2) * scale
    sample = torch.einsum("bij,bfyxj->bfyxi", turn, offset) / half[:, None, None, None, None]
    up = up.expand(-1, frames, -1, -1).reshape(batch * frames, 1, 32, 32)
    ink = F.grid_sample(up, sample.reshape(batch * frames, SIZE, SIZE, 2), align_corners=False)
    return ink.reshape(batch, frames, SIZE, SIZE)


def paint(ink: Tensor, colour: Tensor) -> Tensor:
    """Ink (B, F, H, W) in [0, 1] in palette colours (B,) on the background, (B, 3, F, H, W) in [0, 1]."""
    palette = torch.tensor(list(COLOURS.values()), device=ink.device)[colour]  # (B, 3)
    ground = torch.tensor(BACKGROUND, device=ink.device)
    return ground[None, :, None, None, None] + ink[:, None] * (palette - ground)[:, :, None, None, None]
