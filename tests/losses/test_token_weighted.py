import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import AttarError
from attar.losses import (
    joint_token_weights,
    mse,
    relative_error,
    streams_token_weighted_mse,
    token_weighted_mse,
    token_weights,
    weight_percentiles,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(1e-3, 1e5))
def test_weights_attain_both_ends_of_the_range_in_every_sample(seed, tokens, size):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(3, tokens, generator=generator) * size
    weights = token_weights(mass)
    assert torch.allclose(weights.amin(1), torch.full((3,), 0.5))
    assert torch.allclose(weights.amax(1), torch.full((3,), 1.0))
    order = torch.randperm(tokens, generator=generator)
    assert torch.equal(token_weights(mass[:, order]), weights[:, order])


def test_constant_mass_and_rounding_noise_give_the_high_weight():
    noisy = torch.full((2, 50), 8.0) + 1e-5 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    for mass in (torch.full((1, 7), 3.0), torch.zeros(1, 7), noisy):
        assert torch.equal(token_weights(mass), torch.ones_like(mass))


def test_the_guard_is_per_sample():
    mass = torch.stack([torch.full((4,), 2.0), torch.tensor([1.0, 2.0, 3.0, 5.0])])
    weights = token_weights(mass, low=0.2)
    assert torch.equal(weights[0], torch.ones(4))
    assert torch.allclose(weights[1], torch.tensor([0.2, 0.4, 0.6, 1.0]))


def test_quantile_cap_keeps_an_attention_sink_from_flattening_the_rest():
    mass = torch.cat([torch.linspace(1, 2, 99), torch.tensor([1000.0])])[None]
    assert weight_percentiles(token_weights(mass))[90] < 0.51
    capped = token_weights(mass, cap_quantile=0.95)
    assert weight_percentiles(capped)[90] > 0.6
    assert float(capped.max()) == 1.0


@pytest.mark.parametrize("options", [{"low": 0.0}, {"low": 2.0}, {"cap_quantile": 0.0}])
def test_bad_ranges_are_refused(options):
    with pytest.raises(AttarError):
        token_weights(torch.rand(1, 4), **options)


def test_joint_streams_share_one_min_max():
    torch.manual_seed(0)
    mass = {"encoder_hidden_states": torch.rand(2, 5) + 3, "hidden_states": torch.rand(2, 9)}
    weights = joint_token_weights(mass, order=("hidden_states", "encoder_hidden_states"))
    joined = token_weights(torch.cat([mass["hidden_states"], mass["encoder_hidden_states"]], 1))
    assert torch.equal(weights["hidden_states"], joined[:, :9])
    assert torch.equal(weights["encoder_hidden_states"], joined[:, 9:])
    assert weights["hidden_states"].max() < weights["encoder_hidden_states"].min()


def test_streams_can_be_normalised_each_alone():
    torch.manual_seed(0)
    mass = {"encoder_hidden_states": torch.rand(2, 5) + 3, "hidden_states": torch.rand(2, 9)}
    weights = joint_token_weights(mass, over="stream")
    assert all(torch.equal(weights[name], token_weights(mass[name])) for name in mass)
    assert all(w.min() == 0.5 and w.max() == 1 for w in weights.values())
    with pytest.raises(AttarError, match="joint or stream"):
        joint_token_weights(mass, over="block")


def test_unit_weights_give_plain_mse_and_streams_count_by_token():
    torch.manual_seed(0)
    pred = {"a": torch.randn(2, 5, 8), "b": torch.randn(2, 9, 8)}
    target = {name: torch.randn_like(x) for name, x in pred.items()}
    ones = {name: torch.ones(x.shape[:2]) for name, x in pred.items()}
    plain = mse(pred, target)
    assert torch.allclose(streams_token_weighted_mse(pred, target, ones), plain)
    assert torch.allclose(streams_token_weighted_mse(pred, target, {}), plain)
    one = token_weighted_mse(pred["a"], target["a"], torch.rand(2, 5))
    assert 0 < one < mse({"a": pred["a"]}, {"a": target["a"]})
    by_hand = (pred["a"] - target["a"]).square().mean(-1)
    weights = torch.rand(2, 5)
    assert torch.allclose(token_weighted_mse(pred["a"], target["a"], weights), (by_hand * weights).mean())


@given(st.integers(1, 400), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_percentiles_are_torchs(count, seed):
    weights = torch.rand(2, count, generator=torch.Generator().manual_seed(seed))
    found = weight_percentiles(weights, (0, 7, 50, 99, 100))
    expected = torch.quantile(weights.double(), torch.tensor([0, 0.07, 0.5, 0.99, 1], dtype=torch.float64))
    torch.testing.assert_close(torch.tensor(list(found.values()), dtype=torch.float64), expected)


def test_percentiles_of_more_numbers_than_torch_takes():
    assert weight_percentiles(torch.arange(2**24 + 1), (50, 100)) == {50: 2.0**23, 100: 2.0**24}


def test_streams_must_match():
    x = torch.zeros(1, 2, 3)
    for loss in (mse, lambda p, t: streams_token_weighted_mse(p, t, {})):
        with pytest.raises(AttarError):
            loss({"a": x}, {"b": x})
        with pytest.raises(AttarError):
            loss({}, {})


def test_relative_error_of_no_block_is_one():
    torch.manual_seed(0)
    x, y = {"h": torch.randn(1, 4, 8)}, {"h": torch.randn(1, 4, 8)}
    assert float(relative_error(x, y, x)) == pytest.approx(1.0)
    assert float(relative_error(y, y, x)) == 0.0
