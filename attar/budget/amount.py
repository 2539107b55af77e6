"""A budget as users write it: `0.30x`, `3.2bits`, `0.5dB`, `same`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from attar.errors import AttarError

UNITS: dict[str, Literal["size", "bits", "loss"]] = {"x": "size", "bits": "bits", "db": "loss"}


@dataclass(frozen=True)
class Budget:
    """What a plan may cost.

    "size": packed bytes of the quantized linears, with scales, transforms and biases, as a share of their bfloat16
    bytes. "bits": mean bits of a quantized weight, its codes alone. "loss": decibels by which the predicted error of
    the blocks may lie above that of the recipe's own bits in every layer. "same": mean bits, as many as the recipe has.
    """

    kind: Literal["size", "bits", "loss", "same"]
    value: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Raises AttarError for anything but a number with one of the three units, and "same"."""
        if text.strip().lower() == "same":
            return cls("same", 0.0)
        found = re.fullmatch(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*(x|bits?|db)\s*", text, re.IGNORECASE)
        if found is None:
            raise AttarError(
                f"{text!r} is no budget",
                fix="Write a share of the size (0.30x), mean bits (3.2bits), a loss of closeness (0.5dB), or same",
            )
        unit = found[2].lower()
        budget = cls(UNITS["bits" if unit.startswith("bit") else unit], float(found[1]))
        if not math.isfinite(budget.value) or (budget.kind != "loss" and budget.value <= 0):
            raise AttarError(f"the budget cannot be {text!r}", fix="Give more than nothing")
        return budget

    def at(self, bits: int) -> Budget:
        """What it comes to for a recipe with so many bits."""
        return Budget("bits", float(bits)) if self.kind == "same" else self

    def __str__(self) -> str:
        if self.kind == "same":
            return "same"
        return f"{self.value:g}{ {'size': 'x', 'bits': 'bits', 'loss': 'dB'}[self.kind] }"
