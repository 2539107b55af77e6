"""The Fréchet distance: closed forms of normal distributions."""

import pytest
import torch

from attar.errors import AttarError
from attar.evaluate.frechet import frechet_distance


def whitened(n, d, seed=0):
    """Features whose mean is 0 and whose covariance is the unit matrix, exactly."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov(correction=0))).T


def test_equal_sets_are_at_no_distance():
    x = torch.randn(50, 6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(x, x[torch.randperm(50)]) == pytest.approx(0, abs=1e-8)
    few = torch.randn(4, 6)  # a covariance without full rank
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-8)


def test_a_shift_counts_squared_and_scales_by_their_difference():
    x, y = whitened(60, 4), whitened(80, 4, 1)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5])
    assert frechet_distance(x, y + shift) == pytest.approx(shift.square().sum().item())
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0])
    assert frechet_distance(x, y * scale) == pytest.approx((scale - 1).square().sum().item())
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    first, second = frechet_distance(x, y * scale), frechet_distance(x @ rotation, (y * scale) @ rotation)
    assert first == pytest.approx(second)
    assert frechet_distance(x, y * scale) == pytest.approx(frechet_distance(y * scale, x))
    assert frechet_distance(x[:, :1], 3 * y[:, :1] + 1) == pytest.approx(1 + 4)


def test_what_cannot_be_compared():
    for first, second in ((torch.zeros(3, 2), torch.zeros(3, 4)), (torch.zeros(1, 2), torch.zeros(3, 2))):
        with pytest.raises(AttarError, match="cannot be compared"):
            frechet_distance(first, second)
    with pytest.raises(AttarError, match="not finite"):
        frechet_distance(torch.full((3, 2), torch.nan), torch.zeros(3, 2))
