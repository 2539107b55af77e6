"""A small network that makes images of latents (Genie, arXiv 2212.04780)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT = 256  # numbers in a latent


class Generator(nn.Module):
    """Images from latents (B, 256) -> (B, *shape): a linear, two stages that double the resolution, tanh, and a batch
    normalisation (Genie, figure 3).

    shape: (C, H, W) of an image. rng: of the start. statistics: the mean and deviation that each channel of a batch
    gets, as in Genie; None trains them, from (0, 1) on. channels: of the small image that the linear makes.
    Its size does not depend on how many images it makes.
    """

    def __init__(
        self,
        shape: Sequence[int],
        rng: torch.Generator,
        statistics: tuple[float, float] | None = (0.0, 1.0),
        channels: int = 128,
    ) -> None:
        super().__init__()
        depth, height, width = shape
        self.sizes = [(-(-height // k), -(-width // k)) for k in (4, 2, 1)]  # rounded up
        area = self.sizes[0][0] * self.sizes[0][1]
        with torch.device("meta"):  # torch's own generators are not asked for a start
            self.linear = nn.Linear(LATENT, channels * area)
            self.convs = nn.ModuleList(
                nn.Conv2d(a, b, 3, padding=1)
                for a, b in ((channels, channels), (channels, channels // 2), (channels // 2, depth))
            )
            self.norms = nn.ModuleList(
                nn.BatchNorm2d(c, track_running_stats=False) for c in (channels, channels, channels // 2)
            )
        mean, deviation = statistics or (0.0, 1.0)
        self.mean, self.deviation = (
            nn.Parameter(torch.full((depth,), value), requires_grad=statistics is None)
            for value in (mean, deviation)
        )
        for part in (self.linear, self.convs, self.norms):
            part.to_empty(device="cpu")
        for layer in (self.linear, *self.convs):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=rng)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        for norm in self.norms:
            nn.init.ones_(norm.weight)  # type: ignore[arg-type]
            nn.init.zeros_(norm.bias)  # type: ignore[arg-type]

    def forward(self, latents: Tensor) -> Tensor:
        x = self.linear(latents).unflatten(1, (-1, *self.sizes[0]))
        x = self.norms[0](x)
        for size, conv, norm in zip(self.sizes[1:], self.convs, self.norms[1:], strict=False):  # type: ignore[arg-type]
            x = F.leaky_relu(norm(conv(F.interpolate(x, size=size))), 0.2)
        return F.batch_norm(self.convs[-1](x).tanh(), None, None, self.deviation, self.mean, training=True)
