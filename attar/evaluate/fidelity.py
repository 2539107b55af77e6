"""Closeness of a compressed model's output to the original's, pair by pair: same prompts, same noise.

Closeness is not quality: a video can leave the original's pixels and still be right, or stay near them and be
wrong. Report both families of figures together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from attar.errors import AttarError

_SSIM_WINDOW = 11  # side of the Gaussian window of Wang et al. 2004
_AT_ONCE = 1 << 22  # numbers in the frames of which SSIM is computed at once: it takes 35 times their bytes


def psnr(reference: Tensor, compressed: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each video, in dB.

    reference, compressed: (B, F, C, H, W), floating, values in [0, 1]. Returns (B,) float64. The squared
    error is averaged over the whole video before the logarithm, so one bad frame counts. Identical videos
    give `inf`. Raises AttarError for unequal shapes, other ranks, values outside [0, 1] and non-finite
    values.
    """
    _check_videos(reference, compressed)
    pairs = zip(reference.split(1), compressed.split(1), strict=True)  # as float64 one video at a time
    error = torch.cat([(a.double() - b.double()).square().flatten(1).mean(1) for a, b in pairs])
    return -10 * torch.log10(error)


def ssim(reference: Tensor, compressed: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each video: the mean over its frames, 1 when identical.

    reference, compressed: (B, F, C, H, W), floating, values in [0, 1], H and W at least 11. Returns (B,)
    float32. Raises AttarError as `psnr` does, and for frames smaller than the 11×11 window.
    """
    _check_videos(reference, compressed)
    batch, frames, _, height, width = reference.shape
    if min(height, width) < _SSIM_WINDOW:
        raise AttarError(
            f"SSIM needs frames of at least {_SSIM_WINDOW}×{_SSIM_WINDOW} pixels, these are {height}×{width}",
            fix="Leave SSIM out for such small videos",
        )
    values = []
    count = max(1, _AT_ONCE // reference[0, 0].numel())
    # (B, F, C, H, W) -> pieces of (B*F, C, H, W)
    pieces = (videos.flatten(0, 1).split(count) for videos in (compressed, reference))
    for some, other in zip(*pieces, strict=True):
        found = structural_similarity_index_measure(
            some.float(), other.float(), data_range=1.0, reduction="none"
        )
        assert isinstance(found, Tensor)  # a tuple only where asked for
        values.append(found.reshape(-1))
    return torch.cat(values).reshape(batch, frames).mean(1)


def latent_error(reference: Tensor, compressed: Tensor) -> Tensor:
    """Relative squared error of final latents, ‖reference − compressed‖² / ‖reference‖², one for each.

    Any shape (B, ...), floating. Returns (B,) float64. Raises AttarError for unequal shapes, non-finite
    values and a reference that is zero everywhere.
    """
    _check_pair(reference, compressed)
    reference, compressed = reference.double().flatten(1), compressed.double().flatten(1)
    energy = reference.square().sum(1)
    if bool((energy == 0).any()):
        raise AttarError("a reference latent is zero everywhere, so no relative error exists")
    return (reference - compressed).square().sum(1) / energy


def _check_pair(reference: Tensor, compressed: Tensor) -> None:
    if reference.shape != compressed.shape:
        raise AttarError(
            f"the two outputs differ in shape: {tuple(reference.shape)} and {tuple(compressed.shape)}",
            fix="Generate both with the same number of frames, height and width",
        )
    for name, tensor in (("reference", reference), ("compressed", compressed)):
        if not tensor.is_floating_point():
            raise AttarError(f"the {name} output is {tensor.dtype}", fix="Convert it to floating point first")
        if tensor.ndim < 2 or tensor.numel() == 0:
            raise AttarError(f"the {name} output of shape {tuple(tensor.shape)} holds nothing to compare")
        if not bool(torch.isfinite(tensor).all()):
            raise AttarError(
                f"the {name} output holds non-finite values",
                fix="The model diverged: try more bits, or float32 instead of float16",
            )


def _check_videos(reference: Tensor, compressed: Tensor) -> None:
    _check_pair(reference, compressed)
    if reference.ndim != 5:
        raise AttarError(f"videos must be (B, F, C, H, W), not {tuple(reference.shape)}")
    for name, video in (("reference", reference), ("compressed", compressed)):
        low, high = (float(v) for v in torch.aminmax(video))
        if low < -1e-3 or high > 1 + 1e-3:
            raise AttarError(
                f"values of the {name} video run from {low:.3g} to {high:.3g}",
                fix="Scale videos to [0, 1] first",
            )
