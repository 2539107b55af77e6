"""The low-rank branch beside a packed product, and its gate over the frames of a video."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attar.errors import AttarError
from attar.runtime.scheme import FRAME_GATE

Branch = tuple[Tensor, Tensor]  # low (..., rank), a narrow product of the inputs, and up (out, rank)


def branch_low(x: Tensor, down: Tensor, gate: Tensor | None = None) -> Tensor:
    """The narrow product (..., rank) inside `branch_product`, which multiplies it by the other factor."""
    low = F.linear(x, down)
    return low if gate is None else _gated(low, gate)


def finished(y: Tensor, branch: Branch | None, gelu: str | None) -> Tensor:
    """A product y (..., out) in the model's type, plus low (..., rank) · up (out, rank)ᵀ, or GELU of it.

    y may be written to: on a processor, adding a tensor of its size costs ten times as much.
    """
    if branch is not None:
        low, up = branch
        y = y.reshape(-1, y.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), up.T).view(y.shape)
    return y if gelu is None else F.gelu(y, approximate=gelu)


def branch_product(x: Tensor, down: Tensor, up: Tensor, gate: Tensor | None = None) -> Tensor:
    """(x Aᵀ) Bᵀ, with a gate times M of the frame that each token belongs to (Q-VDiT, arXiv 2505.22167, TQE).

    x: (..., in), with a gate (B, N, in), whose N tokens are the frames one after another. down A: (rank, in), up B:
    (out, rank), gate M: (frames,), of any type. Raises AttarError where N is not a multiple of the frames.
    """
    return F.linear(branch_low(x, down, gate), up)


def _gated(z: Tensor, gate: Tensor) -> Tensor:
    """z (B, N, rank) with the tokens of frame i times M_i; ones change no bit."""
    frames = gate.shape[0]
    if z.ndim != 3 or z.shape[1] % frames:
        raise AttarError(
            f"an input of shape ({', '.join(map(str, z.shape[:-1]))}, channels) is not (batch, tokens, channels) with "
            f"tokens of {frames} frames, for which the layer's branch has a gate",
            where=FRAME_GATE,
            fix="Generate as many frames as the calibration did, or compress with quantize.low_rank.gate=none",
        )
    return (z.unflatten(1, (frames, -1)) * gate.to(z.dtype)[:, None, None]).flatten(1, 2)
