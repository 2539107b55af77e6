"""Budgets as they are written, and the choices that they lead to."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.budget.amount import Budget
from attar.budget.choice import Candidate, Layer, choose_bits, totals
from attar.errors import AttarError

WIDTHS = (2, 3, 4, 6)


@pytest.mark.parametrize(
    ("text", "kind", "value", "shown"),
    [
        ("0.30x", "size", 0.3, "0.3x"),
        (".5X", "size", 0.5, "0.5x"),
        ("3.2bits", "bits", 3.2, "3.2bits"),
        (" 4 bits ", "bits", 4, "4bits"),
        ("3bit", "bits", 3, "3bits"),
        ("0.5dB", "loss", 0.5, "0.5dB"),
        ("-1db", "loss", -1, "-1dB"),
        ("0dB", "loss", 0, "0dB"),
        ("Same", "same", 0, "same"),
    ],
)
def test_budgets(text, kind, value, shown):
    budget = Budget.parse(text)
    assert (budget.kind, budget.value, str(budget)) == (kind, value, shown)
    assert budget.at(3) == (Budget("bits", 3) if kind == "same" else budget)


@pytest.mark.parametrize(
    "text", ["", "x", "3", "3.2.1x", "0x", "-1bits", "0bits", "nanx", "infdB", "3 GB", "1e3x"]
)
def test_what_is_no_budget(text):
    with pytest.raises(AttarError, match="budget"):
        Budget.parse(text)


@st.composite
def layers(draw):
    """Layers whose error falls with the bits; one may have bits of its own."""
    made = []
    for k in range(draw(st.integers(1, 4))):
        weights, base = draw(st.integers(8, 64)) * 8, draw(st.floats(1e-3, 10))
        at = {
            b: Candidate(b, weights * b // 8 + 5, base * 4.0**-b * draw(st.floats(0.5, 1.5))) for b in WIDTHS
        }
        chosen = (at[4],) if k == 0 and draw(st.booleans()) else tuple(at.values())
        made.append(Layer(f"layer{k}", weights, 2 * weights, at[4], chosen))
    return made


def every_choice(some):
    return [totals(some, row) for row in itertools.product(*(layer.candidates for layer in some))]


@settings(max_examples=80, deadline=None)
@given(layers(), st.floats(0.1, 0.4))
def test_a_size_is_kept_with_the_smallest_error(some, share):
    fits = [t for t in every_choice(some) if t.size <= share * sum(layer.dense for layer in some)]
    if not fits:
        with pytest.raises(AttarError, match="no plan keeps to the budget"):
            choose_bits(some, Budget("size", share))
        return
    found = totals(some, choose_bits(some, Budget("size", share)))
    assert found.ratio <= share
    assert found.error == pytest.approx(min(t.error for t in fits), rel=1e-9)


@settings(max_examples=80, deadline=None)
@given(layers(), st.sampled_from((2.0, 2.5, 3.0, 4.0, 5.5)))
def test_mean_bits_are_kept_with_the_smallest_error(some, bits):
    fits = [t for t in every_choice(some) if t.bits <= bits + 1e-12]
    if not fits:
        with pytest.raises(AttarError, match=r"come to \d"):
            choose_bits(some, Budget("bits", bits))
        return
    found = totals(some, choose_bits(some, Budget("bits", bits)))
    assert found.bits <= bits + 1e-12
    assert found.error == pytest.approx(min(t.error for t in fits), rel=1e-9)


@settings(max_examples=80, deadline=None)
@given(layers(), st.sampled_from((-5.0, 0.0, 0.5, 3.0)))
def test_a_loss_is_kept_with_the_smallest_size(some, decibels):
    allowed = sum(layer.uniform.error for layer in some) * 10 ** (decibels / 10) * (1 + 1e-9)
    fits = [t for t in every_choice(some) if t.error <= allowed]
    if not fits:
        with pytest.raises(AttarError, match=r"reach -?\d+\.\d+dB"):
            choose_bits(some, Budget("loss", decibels))
        return
    found = totals(some, choose_bits(some, Budget("loss", decibels)))
    assert found.error <= allowed * (1 + 1e-12)
    assert found.size == min(t.size for t in fits)


def test_no_loss_is_possible_where_the_recipes_own_bits_may_be_chosen():
    some = [Layer("a", 64, 128, c := Candidate(4, 37, 0.1), (c,)), Layer("b", 8, 16, c, (c,))]
    assert choose_bits(some, Budget("loss", 0.0)) == [c, c]


def test_a_fragile_layer_gets_the_widest():
    def layer(name, base):
        at = [Candidate(b, 100 * b, base * 4.0**-b) for b in (2, 3, 4, 8)]
        return Layer(name, 800, 1600, at[1], tuple(at))

    found = choose_bits(
        [layer("plain", 1.0), layer("fragile", 1e6), layer("other", 1.0)], Budget("bits", 4.0)
    )
    assert [c.bits for c in found] == [2, 8, 2]
    assert math.isclose(totals([layer("x", 1.0)], [found[0]]).bits, 2)
