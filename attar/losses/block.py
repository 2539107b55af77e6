"""The loss that a block's reconstruction minimises, put together from its terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attar.errors import AttarError
from attar.losses.reconstruction import mse
from attar.losses.temporal import temporal_distillation
from attar.losses.token_weighted import streams_token_weighted_mse


@dataclass(frozen=True)
class TemporalTerm:
    """weight · L_TMD of one stream, whose `tokens` are `frames` frames one after another.

    Raises AttarError for fewer than two frames, and on a stream of another length.
    """

    weight: float
    stream: str
    frames: int
    tokens: int

    def __post_init__(self) -> None:
        if self.frames < 2:
            raise AttarError(
                "a temporal loss compares frames, and the model makes images",
                where="reconstruct.temporal_weight",
                fix="Set it to 0",
            )

    def __call__(self, pred: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
        if self.stream not in pred or pred[self.stream].shape[1] != self.tokens:
            shapes = ", ".join(f"{name} {output.shape[1]}" for name, output in pred.items())
            raise AttarError(
                f"no stream of the block is the {self.tokens} tokens of the video ({shapes})",
                where="reconstruct.temporal_weight",
                fix="Set it to 0",
            )
        return self.weight * temporal_distillation(pred[self.stream], target[self.stream], self.frames)


@dataclass(frozen=True)
class BlockLoss:
    """Squared error over all streams, weighted by the attention of each token or not, and a temporal term or none.

    Called with stream → (B, N, d) twice, and the token weights, stream → (B, N) or None. Returns a scalar.
    """

    token_weighted: bool = False
    temporal: TemporalTerm | None = None

    def __call__(
        self,
        pred: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        if self.token_weighted:
            value = streams_token_weighted_mse(pred, target, weights or {})
        else:
            value = mse(pred, target)
        return value if self.temporal is None else value + self.temporal(pred, target)
