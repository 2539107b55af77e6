"""What of a video each layer answers for (ViDiT-Q's metric-decoupled mixed precision)."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.budget.amount import Budget
from attar.budget.choice import Candidate, Layer, choose_bits, choose_within
from attar.budget.metrics import METRICS, metric_of, parts, video_of
from attar.errors import AttarError


def energy(video):
    return video.double().square().sum().item()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 17), st.integers(1, 17), st.integers(0, 99))
def test_the_parts_add_up_and_so_do_their_squares(frames, height, width, seed):
    video = torch.randn(2, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)).double()
    found = parts(video)
    assert tuple(found) == METRICS
    torch.testing.assert_close(sum(found.values()), video)
    assert math.fsum(map(energy, found.values())) == pytest.approx(energy(video), rel=1e-9)
    for one in METRICS:  # what a metric sees of its own part is all of it, and of another's nothing
        again = parts(found[one])
        torch.testing.assert_close(again[one], found[one])
        assert all(energy(again[other]) < 1e-18 * energy(video) for other in METRICS if other != one)


def test_what_each_metric_sees():
    frames, side = 4, 16
    across = torch.arange(side) / side
    still = torch.ones(1, 1, frames, side, side) + torch.cos(
        2 * math.pi * across
    )  # one wave across the picture
    moving = torch.stack(
        [torch.cos(2 * math.pi * (across - t / frames)).expand(side, side) for t in range(frames)]
    )
    fine = torch.cos(math.pi * torch.arange(side)).expand(
        1, 1, frames, side, side
    )  # black and white by turns
    for video, metric in ((still, "content"), (moving[None, None], "motion"), (fine, "quality")):
        assert energy(parts(video)[metric]) == pytest.approx(energy(video), rel=1e-5)


def test_a_picture_has_no_motion():
    assert not parts(torch.randn(1, 4, 1, 8, 8))["motion"].any()


@pytest.mark.parametrize(
    ("role", "of_a_video", "of_a_picture"),
    [
        ("cross_attn.q", "content", "content"),
        ("self_attn.o", "motion", "quality"),
        ("joint_attn.k", "motion", "quality"),
        ("joint_attn.add_k", "content", "content"),
        ("ffn_context.up", "content", "content"),
        ("ffn.down", "quality", "quality"),
        ("modulation", "quality", "quality"),
        ("resnet.conv1", "quality", "quality"),
    ],
)
def test_which_metric_a_layer_has(role, of_a_video, of_a_picture):
    assert (metric_of(role, 5), metric_of(role, 1)) == (of_a_video, of_a_picture)


def test_latents_of_every_layout():
    video = torch.randn(1, 3, 2, 4, 5)  # B C F h w
    assert torch.equal(video_of(video, "BCFHW", (1, 1, 1)), video)
    assert torch.equal(video_of(video.permute(0, 2, 1, 3, 4), "BFCHW", (1, 1, 1)), video)
    assert torch.equal(video_of(video.flatten(2).mT, "BCFHW", (2, 4, 5)), video)
    assert torch.equal(video_of(video[:, :, 0], "BCFHW", (1, 1, 1)), video[:, :, :1])
    for other in (video.flatten(2).mT[:, :-1], video[0, 0, 0]):
        with pytest.raises(AttarError, match="no video") as refused:
            video_of(other, "BCFHW", (2, 4, 5))
        assert "allocate.objective=latents" in (refused.value.fix or "")


@st.composite
def grouped(draw):
    """Layers in groups, with errors that one sees of them and those that another one sees."""
    some, seen, groups = [], [], []
    for k in range(draw(st.integers(2, 5))):
        weights = draw(st.integers(8, 64)) * 8
        errors = [draw(st.floats(1e-3, 10)) for _ in range(2)]
        own, other = ([Candidate(b, weights * b // 8 + 5, e * 4.0**-b) for b in (2, 3, 4, 6)] for e in errors)
        some.append(Layer(f"layer{k}", weights, 2 * weights, own[2], tuple(own)))
        seen.append(Layer(f"layer{k}", weights, 2 * weights, other[2], tuple(other)))
        groups.append(draw(st.sampled_from(METRICS)))
    return some, seen, groups


@settings(max_examples=60, deadline=None)
@given(grouped(), st.sampled_from([Budget("bits", 3.5), Budget("size", 0.25)]))
def test_each_group_keeps_its_cost_and_is_best_in_its_own_metric(given_layers, budget):
    some, seen, groups = given_layers
    taken = choose_bits(some, budget)
    found = choose_within(seen, groups, taken, budget)

    def cost(mine, row):
        return sum(
            c.bits * seen[i].weights if budget.kind == "bits" else c.size
            for i, c in zip(mine, row, strict=True)
        )

    for group in set(groups):
        mine = [i for i, g in enumerate(groups) if g == group]
        limit = cost(mine, [taken[i] for i in mine])
        choices = [
            row for row in itertools.product(*(seen[i].candidates for i in mine)) if cost(mine, row) <= limit
        ]
        best = min(math.fsum(c.error for c in row) for row in choices)
        assert cost(mine, [found[i] for i in mine]) <= limit
        assert math.fsum(found[i].error for i in mine) == pytest.approx(best, rel=1e-9)


def test_equal_errors_change_nothing():
    some = [
        Layer(f"{k}", 8, 16, Candidate(4, 9, 1.0), tuple(Candidate(b, 2 * b, (k + 1) * 4.0**-b) for b in (2, 4, 8)))
        for k in range(4)
    ]  # fmt: skip
    taken = choose_bits(some, Budget("bits", 4))
    assert (
        choose_within(some, ["content", "content", "quality", "quality"], taken, Budget("bits", 4)) == taken
    )
