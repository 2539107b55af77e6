import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.calibration.select import (
    POLICIES,
    ScoreTable,
    amplification_metric,
    change_metric,
    min_max,
    patchify,
    rank,
    rank_correlation,
    select,
    selection_histogram,
)
from attar.errors import AttarError


def make_table(prompts=6, steps=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = [(p, s) for p in range(prompts) for s in range(steps)]
    return ScoreTable.build(
        [p for p, _ in pairs],
        [s for _, s in pairs],
        torch.rand(len(pairs), generator=generator),
        torch.rand(len(pairs), generator=generator),
    )


def test_spectral_metric_is_the_largest_squared_singular_value():
    torch.manual_seed(0)
    for n, d in ((300, 64), (40, 96), (64, 3), (5, 1)):
        x = torch.randn(n, d)
        exact = torch.linalg.svdvals(x.double())[0].square()
        assert amplification_metric(x).item() == pytest.approx(exact.item(), rel=1e-4)
        assert amplification_metric(3 * x).item() == pytest.approx(9 * exact.item(), rel=1e-4)


def test_spectral_and_frobenius_agree_on_rank_one_and_on_zero():
    torch.manual_seed(0)
    x = torch.outer(torch.randn(50), torch.randn(20))
    spectral, frobenius = amplification_metric(x), amplification_metric(x, norm="frobenius")
    assert torch.allclose(spectral, frobenius, rtol=1e-4)
    assert amplification_metric(torch.zeros(4, 3)).item() == 0
    with pytest.raises(AttarError):
        amplification_metric(x, norm="nuclear")


def test_the_metric_bounds_the_damage_of_a_weight_error():
    torch.manual_seed(0)
    x, error = torch.randn(80, 24), torch.randn(12, 24)
    damage = (x @ error.T).square().sum()
    c = amplification_metric(x)[0]
    assert damage <= c * error.square().sum() * (1 + 1e-5)
    top = torch.linalg.eigh(x.T @ x).eigenvectors[:, -1]
    aligned = torch.outer(torch.randn(12), top)
    assert torch.allclose((x @ aligned.T).square().sum(), c * aligned.square().sum(), rtol=1e-3)


def test_metrics_do_not_depend_on_the_batch_split():
    torch.manual_seed(0)
    x = torch.randn(6, 30, 16)
    for norm in ("spectral", "frobenius"):
        whole = amplification_metric(x, norm=norm)
        assert torch.equal(whole, torch.cat([amplification_metric(part, norm=norm) for part in x]))
    y = torch.randn(6, 30, 16)
    split = torch.cat([change_metric(x[i : i + 1], y[i : i + 1]) for i in range(6)])
    assert torch.allclose(change_metric(x, y), split)


def test_change_metric_by_hand_and_on_zero():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert torch.allclose(change_metric(x, 2 * x), torch.tensor([1.0, 0.0]))


def test_min_max_of_equal_scores_is_one():
    assert torch.equal(min_max(torch.full((5,), 2.0)), torch.ones(5, dtype=torch.float64))
    assert torch.equal(min_max(torch.tensor([1.0, 3.0, 2.0])), torch.tensor([0, 1, 0.5], dtype=torch.float64))


def test_ranks_are_not_pressed_together_by_one_large_value():
    scores = torch.tensor([3.0, 1.0, 1000.0, 2.0])
    assert torch.equal(rank(scores), torch.tensor([2, 0, 3, 1], dtype=torch.float64) / 3)
    assert torch.equal(rank(torch.tensor([1.0, 1, 2])), torch.tensor([0, 0, 1], dtype=torch.float64))
    assert torch.equal(rank(torch.full((5,), 2.0)), torch.ones(5, dtype=torch.float64))
    # candidate 0 is large in one metric only; min–max lets it hide that 1 is better than 2 in the other
    change, amplification = [1e6, 2.0, 1.0, 0.0], [1.0, 3.0, 4.0, 0.0]
    chosen = {
        how: select("salient", ScoreTable.build(range(4), [0] * 4, change, amplification, how), 1)
        for how in ("min_max", "rank")
    }
    assert chosen == {"min_max": [0], "rank": [1]}


def test_a_salient_sample_needs_both_metrics():
    change, amplification = torch.rand(20) * 0.1, torch.rand(20) * 0.1
    change[3], amplification[3] = 1.0, 1.0
    change[5], amplification[9] = 1.2, 1.2
    table = ScoreTable.build(range(20), [0] * 20, change, amplification)
    assert select("salient", table, 1) == [3]
    assert table.score[int(change.argmin())] == 0 and table.score[int(amplification.argmin())] == 0
    assert select("change", table, 1) == [5]
    assert select("amplification", table, 1) == [9]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(sorted(POLICIES)))
def test_policies_are_deterministic_and_ignore_the_scale_of_the_pool(seed, policy):
    table = make_table(seed=seed)
    count = 8
    chosen = select(policy, table, count, seed)
    assert len(set(chosen)) == count
    assert chosen == select(policy, table, count, seed)
    scaled = ScoreTable.build(
        table.prompt, table.step, [c * 2**7 for c in table.change], [a * 2**-5 for a in table.amplification]
    )
    assert chosen == select(policy, scaled, count, seed)


def test_salient_and_lowest_are_opposite_ends_and_ties_go_by_index():
    table = make_table()
    ranked = sorted(range(len(table)), key=lambda i: table.score[i])
    assert select("lowest", table, 5) == ranked[:5]
    assert select("salient", table, 5) == ranked[::-1][:5]
    tied = ScoreTable.build([0, 1, 2, 3], [0] * 4, [1.0] * 4, [1.0] * 4)
    assert tied.score == [1.0] * 4
    assert select("salient", tied, 3) == [0, 1, 2]


def test_prompt_policies_take_the_prompts_they_name():
    table = make_table(prompts=8, steps=10)
    for policy, count, prompts in (
        ("one_prompt_all_steps", 10, 1),
        ("few_prompts_all_steps", 20, 5),
        ("few_prompts_random_steps", 20, 5),
    ):
        histogram = selection_histogram(table, select(policy, table, count, seed=3))
        assert len(histogram["prompt"]) == prompts
    assert select("one_prompt_all_steps", table, 10, 0) != select("one_prompt_all_steps", table, 10, 4)
    with pytest.raises(AttarError, match="10 of 11"):
        select("one_prompt_all_steps", table, 11)


def test_step_policies():
    table = make_table(prompts=6, steps=10)
    last = selection_histogram(table, select("last_steps", table, 12))
    assert last == {"prompt": dict.fromkeys(range(6), 2), "step": {8: 6, 9: 6}}
    uniform = selection_histogram(table, select("uniform_steps", table, 10))
    assert uniform["step"] == dict.fromkeys(range(10), 1)
    assert selection_histogram(table, select("uniform_steps", table, 25))["step"].keys() == set(range(10))
    assert sorted(selection_histogram(table, select("uniform_steps", table, 2))["step"]) == [2, 7]
    stratified = select("salient_stratified", table, 5)
    for k, i in enumerate(stratified):
        stratum = [j for j in range(len(table)) if table.step[j] // 2 == k]
        assert table.score[i] == max(table.score[j] for j in stratum)
    assert len(select("salient_stratified", table, len(table))) == len(table)


def test_caps():
    table = make_table()
    histogram = selection_histogram(table, select("salient", table, 12, cap_per_prompt=2, cap_per_step=3))
    assert max(histogram["prompt"].values()) <= 2 and max(histogram["step"].values()) <= 3
    with pytest.raises(AttarError, match="caps"):
        select("salient", table, 13, cap_per_prompt=2)


def test_table_survives_json_and_rejects_bad_metrics():
    table = make_table()
    assert ScoreTable.from_json(table.to_json()) == table
    with pytest.raises(AttarError, match="prompt 1, step 0"):
        ScoreTable.build([0, 1], [0, 0], [1.0, float("nan")], [1.0, 1.0])
    with pytest.raises(AttarError, match="empty"):
        ScoreTable.build([], [], [], [])
    with pytest.raises(AttarError):
        ScoreTable([0], [0], [1.0], [1.0], [])
    with pytest.raises(AttarError, match="salient"):
        select("best", table, 1)
    with pytest.raises(AttarError):
        select("salient", table, 0)


def test_patchify_keeps_every_value_and_reads_any_layout():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6, 8)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 4 * 3 * 4, 3 * 4)
    assert torch.equal(tokens[1, 0], x[1, :, 0, :2, :2].flatten())
    assert torch.equal(patchify(x.transpose(1, 2), 2, layout="BFCHW"), tokens)
    assert torch.equal(patchify(x[0], 2, layout="CFHW"), tokens[0])
    assert torch.equal(patchify(x[:, :, 0], 2, layout="BCHW"), tokens[:, :12])
    assert patchify(x, (2, 3, 4)).shape == (2, 2 * 2 * 2, 3 * 24)
    with pytest.raises(AttarError):
        patchify(x, 4)
    with pytest.raises(AttarError):
        patchify(x, 2, layout="BCHW")


def test_rank_correlation():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.ones(4)) == 0
    assert rank_correlation(torch.tensor([1.0, 1, 2]), torch.tensor([1.0, 2, 3])) == pytest.approx(0.8660254)
