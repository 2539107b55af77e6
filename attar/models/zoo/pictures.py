"""Pictures of one handwritten digit in one colour, and the words that ask for them.

A class-conditional model is asked by a class name, "red seven"; a text-to-image model by a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attar.models.zoo.canvas import COLOURS, DIGITS, SIZE, paint, render_ink

SENTENCES = (
    "a {colour} {digit}",
    "a {digit} in {colour}",
    "the digit {digit} written in {colour}",
)
SCALE = (0.9, 1.3)  # of the digit, against a clip's
REACH = 5.0  # pixels by which its centre is off the canvas' centre at most, in both directions


@dataclass(frozen=True)
class Picture:
    """What a picture shows, as indices into DIGITS and COLOURS."""

    digit: int
    colour: int

    @property
    def words(self) -> dict[str, str]:
        return {"digit": DIGITS[self.digit], "colour": list(COLOURS)[self.colour]}

    @property
    def label(self) -> str:
        """The name of its class: "red seven"."""
        return "{colour} {digit}".format(**self.words)

    @property
    def sentences(self) -> list[str]:
        """All sentences that describe it."""
        return [sentence.format(**self.words) for sentence in SENTENCES]


def all_pictures() -> list[Picture]:
    """Every digit in every colour, in the order of the classes."""
    return [Picture(d, c) for d in range(len(DIGITS)) for c in range(len(COLOURS))]


def split_pictures() -> tuple[list[Picture], list[Picture]]:
    """(train, held-out) for models that read words: each digit lacks one colour in training, each colour a digit."""
    held_out = [Picture(d, (3 * d + 1) % len(COLOURS)) for d in range(len(DIGITS))]
    return [picture for picture in all_pictures() if picture not in held_out], held_out


def parse_picture(text: str) -> Picture | None:
    """The picture that a class name or a sentence asks for, or None when it is not one of ours."""
    known = {words: p for p in all_pictures() for words in (p.label, *p.sentences)}
    return known.get(text.strip())


def random_pictures(scans: Tensor, colour: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pictures of the given scans in palette colours, with random place, slant and size.

    scans: (B, 8, 8) in [0, 1]; colour: (B,) indices. Returns (B, 3, SIZE, SIZE) in [0, 1].
    """
    batch, device = scans.shape[0], scans.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * uniform(batch)
    centres = SIZE / 2 + REACH * (2 * uniform(batch, 2) - 1)  # the whole digit stays on the canvas
    ink = render_ink(
        scans,
        centres[:, None],
        angle=(uniform(batch) - 0.5) * 0.2,
        scale=scale,
        shear=(uniform(batch) - 0.5) * 0.1,
    )
    return paint(ink, colour)[:, :, 0]
