import math

import numpy as np
import pytest

from attar.errors import AttarError
from attar.evaluate.statistics import (
    mean_interval,
    paired_bootstrap,
    paired_difference,
    proportion_interval,
    t_quantile,
)

# two-sided 95 % and 99 % points of Student's t, from the standard tables
TABLE = [(1, 12.706, 63.657), (2, 4.303, 9.925), (3, 3.182, 5.841), (4, 2.776, 4.604), (7, 2.365, 3.499)]
TABLE += [(10, 2.228, 3.169), (30, 2.042, 2.750), (120, 1.980, 2.617), (100_000, 1.960, 2.576)]


@pytest.mark.parametrize(("degrees", "at_95", "at_99"), TABLE)
def test_t_quantile_matches_the_tables(degrees, at_95, at_99):
    assert t_quantile(0.975, degrees) == pytest.approx(at_95, abs=6e-4)
    assert t_quantile(0.995, degrees) == pytest.approx(at_99, abs=6e-4)


def test_mean_interval_of_three_seeds():
    estimate = mean_interval([1.0, 2.0, 3.0])
    assert (estimate.mean, estimate.count) == (2.0, 3)
    assert estimate.standard_error == pytest.approx(1 / math.sqrt(3))
    assert estimate.high - estimate.mean == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [mean_interval(generator.normal(5, 2, 4)) for _ in range(1000)]
    covered = np.mean([estimate.low <= 5 <= estimate.high for estimate in intervals])
    assert 0.93 < covered < 0.97


def test_one_value_has_a_mean_and_no_interval():
    estimate = mean_interval([3.5])
    assert (estimate.mean, estimate.low, estimate.standard_error) == (3.5, None, None)


def test_infinite_psnr_is_counted_apart():
    estimate = mean_interval([30.0, math.inf, 32.0])
    assert (estimate.mean, estimate.count, estimate.infinite) == (31.0, 2, 1)
    assert mean_interval([math.inf]).mean == math.inf


def test_pairing_removes_what_both_share():
    generator = np.random.default_rng(0)
    before = generator.normal(0, 100, 20)
    after = before + 1 + generator.normal(0, 0.1, 20)
    for estimate in (paired_difference(before, after), paired_bootstrap(before, after)):
        assert 0.9 < estimate.low < 1 < estimate.high < 1.1


def test_bootstrap_repeats_and_agrees_with_t_for_many_pairs():
    generator = np.random.default_rng(1)
    before, after = generator.normal(0, 1, 300), generator.normal(0.3, 1, 300)
    first, again = paired_bootstrap(before, after), paired_bootstrap(before, after)
    assert first == again
    assert first != paired_bootstrap(before, after, seed=1)
    exact = paired_difference(before, after)
    assert first.low == pytest.approx(exact.low, abs=0.02)
    assert first.high == pytest.approx(exact.high, abs=0.02)


def test_wilson_interval_stays_inside_and_matches_the_formula():
    estimate = proportion_interval([True] * 10)
    assert (estimate.mean, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(0.7225, abs=1e-4)
    half = proportion_interval([True, False] * 50)
    assert (half.low, half.high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))


def test_bad_values_are_refused():
    for call in (
        lambda: mean_interval([]),
        lambda: mean_interval([math.nan]),
        lambda: mean_interval([1.0], confidence=1.0),
        lambda: paired_difference([1, 2], [1]),
        lambda: paired_difference([math.inf], [1]),
        lambda: paired_bootstrap([1], [1]),
        lambda: proportion_interval([]),
    ):
        with pytest.raises(AttarError):
            call()
