"""The knapsack solver against every choice there is."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.budget.solve import choose


def best(values, weights, limit):
    """The smallest sum of values that fits, by looking at all choices; None where nothing fits."""
    fits = [
        sum(v[k] for v, k in zip(values, ks, strict=True))
        for ks in itertools.product(*(range(len(v)) for v in values))
        if sum(w[k] for w, k in zip(weights, ks, strict=True)) <= limit
    ]
    return min(fits, default=None)


def check(values, weights, limit):
    found, wanted = choose(values, weights, limit), best(values, weights, limit)
    if wanted is None:
        assert found is None
        return
    assert sum(w[k] for w, k in zip(weights, found, strict=True)) <= limit
    assert sum(v[k] for v, k in zip(values, found, strict=True)) == pytest.approx(
        wanted, rel=1e-11, abs=1e-300
    )


small = st.integers(0, 12)
real = st.floats(0, 1e3, allow_nan=False)


def problems(value, weight):
    group = st.integers(1, 4).flatmap(
        lambda n: st.tuples(*[st.lists(x, min_size=n, max_size=n) for x in (value, weight)])
    )
    return st.lists(group, min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(problems(real, small), st.integers(-1, 60))
def test_real_values_and_whole_weights(groups, limit):
    check([v for v, _ in groups], [w for _, w in groups], limit)


@settings(max_examples=150, deadline=None)
@given(problems(small, small), st.integers(-1, 60))
def test_many_ties(groups, limit):
    check([v for v, _ in groups], [w for _, w in groups], limit)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=6),
    st.floats(0, 1),
    st.randoms(),
)
def test_layers_as_they_are(shapes, share, random):
    """Errors that fall by about 6 dB a bit, bytes that grow by the layer's size: the problem that is really solved."""
    bits = (2, 3, 4, 8)
    values = [[e * random.uniform(0.5, 2) * 4.0**-b for b in bits] for e, _ in shapes]
    weights = [[size * b + 3 for b in bits] for _, size in shapes]
    low, high = (sum(f(w) for w in weights) for f in (min, max))
    check(values, weights, low + share * (high - low))
    errors = [sum(f(v) for v in values) for f in (min, max)]
    check(weights, values, errors[0] + share * (errors[1] - errors[0]) + 1e-9)  # the other way round


@pytest.mark.parametrize("seed", range(4))
def test_as_many_layers_as_a_model_has(seed):
    """Against the textbook's table over whole units of weight."""
    generator = np.random.default_rng(seed)
    bits = np.array([2, 3, 4, 5, 6, 8])
    weights = generator.choice([1, 4, 10, 27], 80)[:, None] * bits
    values = generator.lognormal(0, 2, (80, 1)) * 4.0**-bits * generator.lognormal(0, 0.3, (80, 6))
    limit = int(generator.uniform(0.3, 0.9) * weights[:, -1].sum())
    least = np.zeros(limit + 1)  # least sum of values for each limit
    for value, weight in zip(values, weights, strict=True):
        moved = [
            np.concatenate((np.full(w, np.inf), least))[: limit + 1] + v
            for v, w in zip(value, weight, strict=True)
        ]
        least = np.min(moved, axis=0)
    found = choose(values.tolist(), weights.tolist(), limit)
    rows = np.arange(80)
    assert weights[rows, found].sum() <= limit
    assert values[rows, found].sum() == pytest.approx(least[limit], rel=1e-10)


def test_a_large_model_in_a_moment():
    """As many layers as a model of 14 billion weights has, sizes that share no grid."""
    generator = np.random.default_rng(0)
    bits = np.array([2, 3, 4, 5, 6, 8])
    sizes = generator.integers(10**6, 10**8, 400)
    values = generator.lognormal(0, 2, (400, 1)) * 4.0**-bits * generator.lognormal(0, 0.2, (400, 6))
    weights = sizes[:, None] * bits // 8 + 17
    limit = int(0.45 * weights[:, -1].sum())
    started = time.perf_counter()
    found = choose(values.tolist(), weights.tolist(), limit)
    assert time.perf_counter() - started < 5
    rows = np.arange(400)
    assert weights[rows, found].sum() <= limit
    # no single change that fits makes it better
    spare, value = limit - weights[rows, found].sum(), values[rows, found]
    fits = weights - weights[rows, found][:, None] <= spare
    assert not (fits & (values < value[:, None])).any()
