import math

import pytest
import torch

from attar.errors import AttarError
from attar.evaluate import fidelity
from attar.evaluate.fidelity import latent_error, psnr, ssim


@pytest.fixture
def videos():
    torch.manual_seed(0)
    return torch.rand(3, 4, 3, 16, 18)


def test_psnr_of_a_known_error_is_known_and_per_video(videos):
    reference = videos * 0.5
    shift = torch.tensor([0.1, 0.01, 0.2]).reshape(3, 1, 1, 1, 1)
    expected = torch.tensor([20.0, 40.0, -20 * math.log10(0.2)], dtype=torch.float64)
    assert torch.allclose(psnr(reference, reference + shift), expected, atol=1e-4)


def test_identical_videos_have_infinite_psnr_and_ssim_one(videos):
    assert torch.isinf(psnr(videos, videos.clone())).all()
    assert torch.allclose(ssim(videos, videos.clone()), torch.ones(3), atol=1e-6)


def test_ssim_is_the_mean_over_frames_and_falls_with_noise(videos):
    assert videos.shape[1] == 4
    noisy = (videos + 0.1 * torch.randn_like(videos)).clamp(0, 1)
    noisier = (videos + 0.4 * torch.randn_like(videos)).clamp(0, 1)
    assert (ssim(videos, noisy) > ssim(videos, noisier)).all()
    alone = torch.stack([ssim(videos[:, k : k + 1], noisy[:, k : k + 1]) for k in range(4)]).mean(0)
    assert torch.allclose(ssim(videos, noisy), alone, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 3, 5, 100])
def test_a_few_frames_at_a_time_are_the_same_bits(videos, monkeypatch, frames):
    noisy = (videos + 0.1 * torch.randn_like(videos)).clamp(0, 1)
    whole = ssim(videos, noisy), psnr(videos, noisy)
    seen, measure = [], fidelity.structural_similarity_index_measure
    monkeypatch.setattr(fidelity, "_AT_ONCE", frames * videos[0, 0].numel() + 1)
    monkeypatch.setattr(
        fidelity,
        "structural_similarity_index_measure",
        lambda a, b, **kwargs: seen.append(len(a)) or measure(a, b, **kwargs),
    )
    assert torch.equal(ssim(videos, noisy), whole[0])
    assert max(seen) == min(frames, 12) and sum(seen) == 12
    each = [psnr(a[None], b[None]) for a, b in zip(videos, noisy, strict=True)]
    assert torch.equal(torch.cat(each), whole[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_metrics_accept_every_float_type(videos, dtype):
    video = videos.to(dtype)
    assert torch.isfinite(psnr(video, 1 - video)).all()
    assert torch.isfinite(ssim(video, 1 - video)).all()


def test_latent_error_is_relative_and_scale_free():
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 3, 5, 5)
    assert torch.allclose(latent_error(latents, 1.1 * latents), torch.full((2,), 0.01).double(), atol=1e-6)
    noise = torch.randn_like(latents)
    assert torch.allclose(
        latent_error(latents, latents + noise), latent_error(9 * latents, 9 * (latents + noise))
    )
    assert latent_error(latents, latents.clone()).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda v: v[:, :2], "shape"),
        (lambda v: v * float("nan"), "non-finite"),
        (lambda v: v * 255, r"Scale videos to \[0, 1\]"),
        (lambda v: (v * 255).byte(), "uint8"),
    ],
)
def test_videos_that_cannot_be_compared_are_refused(videos, change, word):
    for metric in (psnr, ssim):
        with pytest.raises(AttarError, match=word):
            metric(videos, change(videos))


def test_ssim_of_tiny_frames_and_error_of_zero_latents_are_refused(videos):
    with pytest.raises(AttarError, match="11×11"):
        ssim(videos[..., :8, :8], videos[..., :8, :8])
    with pytest.raises(AttarError, match="zero"):
        latent_error(torch.zeros(1, 4), torch.ones(1, 4))
    with pytest.raises(AttarError, match="B, F, C, H, W"):
        psnr(videos[0], videos[0])
