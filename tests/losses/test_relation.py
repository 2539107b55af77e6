"""Relation losses: MPQ-DM's proof list 7 and 8, MPQ-DMv2's 9 and 10; BiBERT's direction matching."""

import pytest
import torch
from torch.nn.functional import normalize

from attar.errors import AttarError
from attar.losses import direction_distance, memory_divergence, relation_divergence, smoothed
from attar.quantize.relations import FEATURES, RelationSettings, RelationTerm, draw_memory, windows

B, N, C = 2, 12, 8


def features(seed=0):
    torch.manual_seed(seed)
    return torch.randn(B, N, C), torch.randn(B, N, C), normalize(torch.randn(30, C), dim=-1)


def orthogonal():
    return torch.linalg.qr(torch.randn(C, C))[0]


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_zero_for_equal_features_and_blind_to_size_and_common_rotation(temperature):
    student, teacher, memory = features()
    turn, size = orthogonal(), torch.rand(B, N, 1) * 5 + 0.1
    assert relation_divergence(teacher, teacher, temperature) == 0
    assert memory_divergence(teacher, teacher, memory, temperature) == 0
    value = relation_divergence(student, teacher, temperature)
    assert value > 0
    assert relation_divergence(student * size @ turn, teacher, temperature) == pytest.approx(
        float(value), rel=1e-4
    )
    assert relation_divergence(teacher * size @ turn, teacher, temperature) == pytest.approx(0, abs=1e-8)
    value = memory_divergence(student, teacher, memory, temperature)
    assert memory_divergence(student * size, teacher, memory, temperature) == pytest.approx(
        float(value), rel=1e-4
    )
    assert memory_divergence(student, teacher, memory.flip(0), temperature) == pytest.approx(
        float(value), rel=1e-5
    )


def test_another_order_of_places_on_one_side_is_another_thing():
    _, teacher, memory = features()
    assert relation_divergence(teacher.flip(1), teacher) > 1e-3
    assert memory_divergence(teacher.flip(1), teacher, memory) > 1e-3


def test_only_the_student_gets_a_gradient_and_a_finite_one():
    student, teacher, memory = (t.requires_grad_() for t in features())
    (relation_divergence(student, teacher) + memory_divergence(student, teacher, memory)).backward()
    assert teacher.grad is None and memory.grad is None
    assert torch.isfinite(student.grad).all() and bool((student.grad != 0).any())


def test_gradient_is_that_of_finite_differences():
    student, teacher, memory = (t[..., :6, :3].double() if t.ndim == 3 else t[:5, :3] for t in features())
    student, teacher = student[:1], teacher[:1]
    for loss in (
        lambda x: relation_divergence(x, teacher, 0.5).double(),
        lambda x: memory_divergence(x, teacher, memory, 0.5).double(),
    ):
        x = student.clone().requires_grad_()
        loss(x).backward()
        step, numeric = 1e-2, torch.zeros_like(x)
        for i in range(x.numel()):
            d = torch.zeros(x.numel(), dtype=x.dtype)
            d[i] = step
            d = d.view_as(x)
            numeric.view(-1)[i] = (loss(student + d) - loss(student - d)) / (2 * step)
        torch.testing.assert_close(x.grad, numeric, rtol=0.05, atol=2e-4)


def test_directions_are_blind_to_one_size_a_common_rotation_and_a_common_order():
    student, teacher, _ = features()
    turn, size = orthogonal(), torch.tensor([3.0, 1e-3]).view(B, 1, 1)
    assert direction_distance(teacher, teacher) == 0
    assert direction_distance(teacher * size @ turn, teacher) == pytest.approx(0, abs=2e-6)
    value = direction_distance(student, teacher)
    assert 0.1 < value < 2**0.5
    assert direction_distance(student * size @ turn, teacher) == pytest.approx(float(value), rel=1e-5)
    order = torch.randperm(N)
    both = direction_distance(student[:, order], teacher[:, order])
    assert both == pytest.approx(float(value), rel=1e-5)
    assert abs(direction_distance(student[:, order], teacher) - value) > 1e-3
    by_place = torch.linspace(0.5, 2, N)[:, None]  # which cosines do not see
    assert direction_distance(teacher * by_place, teacher) > 0.1


def test_directions_are_what_their_formula_says():
    student, teacher, _ = (t.double() for t in features())
    found = []
    for z, full in zip(student, teacher, strict=True):
        p, q = (t @ t.T / C**0.5 for t in (z, full))
        found.append((p / p.norm() - q / q.norm()).norm())
    torch.testing.assert_close(direction_distance(student, teacher), torch.stack(found).mean())
    for factor in (1e25, 1e-25):  # whose products float32 does not hold
        scaled = direction_distance(student.float() * factor, teacher.float())
        torch.testing.assert_close(scaled, torch.stack(found).mean().float())
    assert direction_distance(torch.zeros(1, N, C), teacher[:1].float()) == pytest.approx(1)


def test_the_gradient_of_directions():
    student, teacher, _ = (t.double() for t in features())
    student, teacher = (
        student[:, :5, :3].clone().requires_grad_(),
        teacher[:, :5, :3].clone().requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda x: direction_distance(x, teacher), student)
    direction_distance(student, teacher).backward()
    assert teacher.grad is None
    # a factor and a rotation change nothing, so the gradient has no part along them
    assert abs((student.grad * student).sum((1, 2))).max() < 1e-12
    turning = student.grad.mT @ student
    torch.testing.assert_close(turning, turning.mT, rtol=1e-9, atol=1e-12)
    same = teacher.detach().clone().requires_grad_()
    direction_distance(same, teacher).backward()
    assert torch.equal(same.grad, torch.zeros_like(same))  # at the minimum, where a norm has no derivative


def test_places_are_limited_for_directions_too():
    student, teacher, _ = features()
    term = RelationTerm(RelationSettings(2.0, window=1, places=5, kind="direction"))
    expected = 2 * direction_distance(student[:, ::3], teacher[:, ::3])
    assert torch.equal(term(student, teacher, 1, 0), expected)
    with pytest.raises(AttarError, match="not with a memory"):
        RelationSettings(1.0, memory=8, kind="direction")
    with pytest.raises(AttarError, match="no relation 'angle'"):
        RelationSettings(1.0, kind="angle")


def test_windows_of_equal_features_are_the_features():
    student, teacher, _ = features()
    assert torch.equal(smoothed(torch.cat([student, student]), 2, 2), student)
    mixed = smoothed(torch.stack([student, teacher, teacher, teacher]).flatten(0, 1), 4, 2)
    torch.testing.assert_close(mixed, torch.cat([(student + teacher) / 2, teacher]))
    assert torch.equal(smoothed(student, 2, 1), student)
    for steps, window in ((3, 2), (4, 3), (3, 3)):
        with pytest.raises(AttarError, match="windows"):
            smoothed(torch.zeros(4, N, C), steps, window)


def test_windows_stay_within_a_prompt_and_do_not_overlap():
    places = [(p, s, part) for p in range(2) for s in range(5) for part in range(2)]
    found = windows(places, 2)
    assert len(found) == 2 * 2 * 2
    for first, second in found:
        (p, s, part), (q, t, other) = places[first], places[second]
        assert (p, part) == (q, other) and t == s + 1 and s % 2 == 0
    assert len({i for pair in found for i in pair}) == 16
    with pytest.raises(AttarError, match="no prompt has as many traced steps as a window, 2"):
        windows(places[:2], 2)


def test_memory_has_rows_of_every_step_with_unit_norm():
    samples = [(None, {FEATURES: torch.full((2, 5, C), float(i + 1)) * torch.eye(C)[i]}) for i in range(6)]
    memory = draw_memory(samples, 25, "0")
    assert memory.shape == (24, C) and torch.allclose(memory.norm(dim=-1), torch.ones(24))
    assert memory.sum(0)[:6].tolist() == [4.0] * 6  # four of each step
    assert torch.equal(memory, draw_memory(samples, 25, "0"))
    with pytest.raises(AttarError, match="smaller than the 6 traced steps"):
        draw_memory(samples, 5, "0")


def test_the_term_is_weighted_averaged_and_thinned():
    student, teacher, memory = features()
    pair, other = torch.cat([student, teacher]), torch.cat([teacher, teacher])
    term = RelationTerm(RelationSettings(3.0, window=2, places=4))
    expected = 3 * relation_divergence(((student + teacher) / 2)[:, ::3], teacher[:, ::3])
    assert term(pair, other, 2, 0) == pytest.approx(float(expected))
    remembered = RelationTerm(RelationSettings(2.0, 1, 0.1, memory=30, anchors=7), memory)
    assert remembered(pair, other, 2, 0) != remembered(pair, other, 2, 1)  # other anchors
    assert remembered(pair, other, 2, 5) == remembered(pair, other, 2, 5)
    whole = RelationTerm(RelationSettings(2.0, 1, 0.1, memory=30, anchors=99), memory)
    assert whole(pair, other, 2, 0) == pytest.approx(2 * float(memory_divergence(pair, other, memory)))
