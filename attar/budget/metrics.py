"""What of a video each layer answers for: its content, the quality of its pictures, or the motion between them.

ViDiT-Q (arXiv 2406.02540, metric-decoupled mixed precision) measures cross-attention by how well a video fits its text
(CLIPSIM), attention inside frames and feed-forward layers by visual quality (DOVER), and attention between frames by a
flow score. Those are networks of their own. Here the change of the final latents is taken apart into three that stand
for them, orthogonal, so that their squares add up to that of the whole.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from attar.errors import AttarError

Metric = Literal["content", "quality", "motion"]
METRICS: tuple[Metric, ...] = get_args(Metric)
COARSE = 1 / 8  # cycles per latent pixel, up to which a picture is coarse


def metric_of(role: str, frames: int) -> Metric:
    """Which of them a layer of that role is measured by, in a model that was given so many frames.

    Layers that read the text, or make it, answer for the content. An attention over a video's tokens is the one place
    where frames meet, so it answers for the motion; over those of a picture for quality, as all other layers do.
    """
    if role.startswith(("cross_attn.", "joint_attn.add_", "ffn_context.")):
        return "content"
    if frames > 1 and role.startswith(("self_attn.", "joint_attn.")):
        return "motion"
    return "quality"


def video_of(latents: Tensor, layout: str, grid: tuple[int, int, int]) -> Tensor:
    """(B, C, F, h, w), a view of latents of any kind: videos with axes as in `layout`, pictures (B, C, h, w), or packed
    tokens (B, N, C), as many as `grid` (frames, height, width) has.

    Raises AttarError for anything else.
    """
    if latents.ndim == 5:
        return latents.permute(*map(layout.index, "BCFHW"))
    if latents.ndim == 4:
        return latents.unsqueeze(2)
    frames, height, width = grid
    if latents.ndim != 3 or latents.shape[1] != frames * height * width:
        raise AttarError(
            f"latents of shape {tuple(latents.shape)} are no video of {frames} x {height} x {width} tokens",
            where="allocate.objective",
            fix="Measure by their squared error: --set allocate.objective=latents",
        )
    return latents.mT.unflatten(-1, grid)


def parts(video: Tensor) -> dict[Metric, Tensor]:
    """Three videos that add up to this one, orthogonal to one another: (B, C, F, h, w) each.

    "quality": in every frame what is finer than `COARSE`. Of the rest, "content" is the mean over the frames, and
    "motion" what differs from it.
    """
    fine = torch.fft.fft2(video)
    rows, columns = (torch.fft.fftfreq(n, device=video.device).abs() > COARSE for n in video.shape[-2:])
    coarse = torch.fft.ifft2(fine.masked_fill(rows[:, None] | columns, 0)).real
    still = coarse.mean(2, keepdim=True)
    return {"content": still.expand_as(video), "quality": video - coarse, "motion": coarse - still}
