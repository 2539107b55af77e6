"""A packed layer whose codes stay while its scales, its bias and the clipping of its activations are trained.

Training step sizes end to end behind a block-by-block calibration is the second phase of EfficientQAT (arXiv
2407.11062, section 3.3), there for weights alone. The checkpoint has the same codes, bytes and kernels as before.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from attar.quantize.product import quantized_acts, quantized_product
from attar.runtime.formats import wide
from attar.runtime.layers import PackedLinear


class ScaledCodes(nn.Module):
    """What a packed layer computes, differentiable in its input, scales, bias and clipping factors.

    log_scale: (out, groups), so that a learning rate is a relative change and scales keep their sign. clip: (2,),
    (groups of steps, 2), or None for a layer without clipping. Values are those of the packed layer up to the rounding
    of the exponential.
    """

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.packed = packed
        self.register_buffer("numbers", packed.numbers().float(), persistent=False)
        self.register_buffer("sign", packed.weight_scale.sign(), persistent=False)
        self.log_scale = nn.Parameter(packed.weight_scale.abs().log())
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.detach().float().clone())
        self.clip = None if packed.act_clip is None else nn.Parameter(packed.act_clip.clone())

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        weight = (self.numbers * self.scale().unsqueeze(-1)).flatten(1)  # type: ignore[operator]
        bits, clip = packed.acts_now(self.clip)
        quantize = partial(quantized_acts, bits=bits, clip=clip, number=packed.act_format)
        return quantized_product(
            x, self._transform, quantize, weight, self.bias, packed.branch, packed.frame_gate is not None
        )

    def _transform(self, x: Tensor) -> Tensor:
        x = wide(x)
        for transform in self.packed.transforms:
            x = transform(x)
        return x

    def group_parameters(self) -> list[nn.Parameter]:
        """Clipping factors with a row for each group of denoising steps, of which a step uses one."""
        return [] if self.clip is None or self.packed.clip_groups is None else [self.clip]

    def scale(self) -> Tensor:
        """(out, groups)."""
        return self.sign * self.log_scale.exp()  # type: ignore[operator]

    @torch.no_grad()
    def trained(self) -> dict[str, Tensor]:
        """The packed layer's tensors as they are now, by their names in it and in its types."""
        found = {"weight_scale": self.scale()}
        if self.bias is not None and self.packed.bias is not None:
            found["bias"] = self.bias.to(self.packed.bias.dtype)
        if self.clip is not None:
            found["act_clip"] = self.clip.detach().clone()
        return found
