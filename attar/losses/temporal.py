"""Temporal maintenance distillation: the frames of a video keep their likeness to one another.

Q-VDiT (arXiv 2505.22167, TMD). The paper compares the model's output; block by block it is a block's output here.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from attar.errors import AttarError


def frame_similarity(video: Tensor, frames: int) -> Tensor:
    """T (B, t, t), float32: cosine similarity of the flattened frames.

    video: (B, N, d), its tokens frame after frame. Raises AttarError when the frames do not divide the tokens.
    """
    if frames < 1 or video.shape[1] % frames:
        raise AttarError(f"{video.shape[1]} tokens are not {frames} frames")
    flat = video.float().reshape(video.shape[0], frames, -1)  # (B, t·m, d) -> (B, t, m·d)
    flat = normalize(flat, dim=-1)
    return flat @ flat.mT


def similarity_divergence(pred: Tensor, target: Tensor) -> Tensor:
    """Σ_i KL(D_i ‖ D̂_i), D = softmax of the rows of T, mean over the batch. pred T̂, target T: (B, t, t).

    The paper's sum over frames (the released code takes the mean over the t² elements). For one sample the gradient
    with respect to T̂ is D̂ - D. Cosines without a temperature give nearly uniform rows, whose divergence would drown
    in the rounding of float32.
    """
    ours, full = (t.double().log_softmax(dim=-1) for t in (pred, target))
    return (full.exp() * (full - ours)).sum(dim=(-2, -1)).mean()


def temporal_distillation(pred: Tensor, target: Tensor, frames: int) -> Tensor:
    """L_TMD of two videos (B, N, d), their tokens frame after frame; a scalar, zero where both are equal.

    Raises AttarError when the frames do not divide the tokens.
    """
    return similarity_divergence(frame_similarity(pred, frames), frame_similarity(target, frames)).float()
