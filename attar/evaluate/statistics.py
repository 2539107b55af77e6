"""Means with intervals, for comparisons over few seeds or prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from attar.errors import AttarError


@dataclass
class Estimate:
    """A mean, its standard error and its confidence interval [low, high].

    `count` values entered the mean. `infinite` more were infinite (the PSNR of identical videos) and are only
    counted. Where every value was infinite the mean is infinite. One value alone has no interval:
    `standard_error`, `low` and `high` are then None.
    """

    mean: float
    standard_error: float | None
    low: float | None
    high: float | None
    count: int
    infinite: int = 0


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean with a two-sided Student-t interval, right for few independent values.

    Raises AttarError for no values, for NaN, and for a confidence outside (0, 1).
    """
    array, infinite = _finite(values)
    _check_confidence(confidence)
    if array.size == 0:
        return Estimate(math.inf, None, None, None, 0, infinite)
    mean = float(array.mean())
    if array.size == 1:
        return Estimate(mean, None, None, None, 1, infinite)
    error = float(array.std(ddof=1) / math.sqrt(array.size))
    half = t_quantile(0.5 + confidence / 2, array.size - 1) * error
    return Estimate(mean, error, mean - half, mean + half, int(array.size), infinite)


def paired_difference(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of `after − before` over pairs (the same seed or prompt), with a Student-t interval.

    Raises AttarError for unequal lengths and non-finite values.
    """
    return mean_interval(_differences(before, after).tolist(), confidence)


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean of `after − before` over pairs, with a percentile bootstrap interval (Efron 1979) over the pairs.

    For many pairs of no particular distribution; below about ten pairs `paired_difference` is the safer one.
    The same seed gives the same interval. Raises AttarError as `paired_difference`, and for fewer than 2
    pairs.
    """
    _check_confidence(confidence)
    differences = _differences(before, after)
    if differences.size < 2:
        raise AttarError("a bootstrap needs at least two pairs")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 1000):  # bounds the memory at 1000 resamples
        stop = min(start + 1000, resamples)
        means[start:stop] = generator.choice(differences, (stop - start, differences.size)).mean(1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(
        float(differences.mean()), float(means.std(ddof=1)), float(low), float(high), int(differences.size)
    )


def proportion_interval(outcomes: Sequence[bool], confidence: float = 0.95) -> Estimate:
    """Share of true outcomes with a Wilson (1927) score interval, honest also at 0 % and 100 %.

    Raises AttarError for no outcomes.
    """
    _check_confidence(confidence)
    count = len(outcomes)
    if count == 0:
        raise AttarError("a proportion of no outcomes does not exist")
    share = sum(bool(outcome) for outcome in outcomes) / count
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(share, math.sqrt(share * (1 - share) / count), low, high, count)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for an integer number of degrees of freedom and a probability in [0.5, 1)."""
    if degrees > 1000:  # the normal is right to three digits there
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1.0
    while _t_inside(high, degrees) < 2 * probability - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2


def _t_inside(t: float, degrees: int) -> float:
    """P(|T| < t), by the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(theta), degrees % 2 == 1
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    series = math.sin(theta) * total
    return 2 / math.pi * (theta + series) if odd else series


def _finite(values: Sequence[float]) -> tuple[np.ndarray, int]:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size == 0:
        raise AttarError("a mean of no values does not exist")
    if np.isnan(array).any() or np.isneginf(array).any():
        raise AttarError("the values hold NaN or minus infinity, so they have no mean")
    finite = np.isfinite(array)
    return array[finite], int((~finite).sum())


def _differences(before: Sequence[float], after: Sequence[float]) -> np.ndarray:
    first, second = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (before, after))
    if first.shape != second.shape:
        raise AttarError(f"pairs need equal lengths, these are {first.size} and {second.size}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise AttarError("a difference of non-finite values does not exist", fix="Drop those pairs first")
    return second - first


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise AttarError(f"a confidence of {confidence} is not between 0 and 1")
