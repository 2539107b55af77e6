"""Codes learned by what the whole block loses (AdaRound, arXiv 2004.10568; BRECQ, 2102.05426), alone or with their
scales (Genie-M, 2212.04780)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.quantize.linear import QuantizedLinear
from attar.quantize.rounding import column_scales
from attar.runtime.formats import integer_range

EDGE = 0.499  # of a step, the farthest that a start lies from its code


class LearnedCodes(nn.Module):
    """A frozen layer whose integer codes are learned, and its scales where `scales` is set; the rest stays as it is.

    `steps` (out, in) are the weights in steps of their scales. The codes are the nearest integers of the range,
    through which the gradient passes as if nothing was rounded. They start at the layer's codes, off by as much of
    what rounding took away as leaves these the nearest, so that weights between two codes change over first.
    `log_scale` (out, groups) is the logarithm of what each scale is multiplied by, so that signs stay. The codes do not
    depend on it, as Genie's base ⌊W/s⌋ does not: a scale's gradient is the weights' times their codes, nothing more.
    Raises AttarError for a layer that is not frozen, and for formats whose codes are no integers.
    """

    def __init__(self, layer: QuantizedLinear, scales: bool = False) -> None:
        super().__init__()
        if any(grid.stored != "int" for grid in layer.quantizer.grids):
            raise AttarError(
                "codes that are no integers cannot be learned",
                where="rounding.epochs",
                fix="Set it to 0, or weight_format to int or full_range",
            )
        weight, scale = layer.baked_weight()
        codes = layer.codes.to(weight.dtype)

        def largest(rows: Tensor, scale: Tensor, bits: int, number: str, levels: Tensor | None) -> Tensor:
            return rows.new_full((len(rows), 1), integer_range(bits)[1])

        self.layer = layer
        self.log_scale = nn.Parameter(torch.zeros_like(scale)) if scales else None
        self.register_buffer("start", scale, persistent=False)
        self.register_buffer("columns", column_scales(scale, weight), persistent=False)
        self.register_buffer("largest", layer.quantizer.by_kinds(largest, weight, scale), persistent=False)
        lost = (weight / self.columns - codes).clamp(-EDGE, EDGE)
        self.steps = nn.Parameter(self._inside(codes + lost))

    start: Tensor  # (out, groups), the scales of the layer
    columns: Tensor  # (out, in), the same for each weight
    largest: Tensor  # (out, 1), the largest code of each row

    def forward(self, x: Tensor) -> Tensor:
        rounded = self._inside(self.steps.round())
        scale = self.columns if self.log_scale is None else column_scales(self._scale(), self.steps)
        return self.layer.forward_with(x, (self.steps + (rounded - self.steps).detach()) * scale)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """(out, in), as `QuantizedLinear.freeze` takes them."""
        return self._inside(self.steps.round()).to(self.layer.codes.dtype)

    @torch.no_grad()
    def scales(self) -> Tensor | None:
        """(out, groups), of the codes as they are now; None where they are not learned."""
        return None if self.log_scale is None else self._scale()

    def _scale(self) -> Tensor:
        return self.start if self.log_scale is None else self.start * self.log_scale.exp()

    def _inside(self, steps: Tensor) -> Tensor:
        return steps.clamp(-self.largest - 1, self.largest)
