import pytest
import torch

from attar.errors import AttarError
from attar.quantize.transforms import (
    FixedHadamard,
    LearnedKronecker,
    LearnedOrthogonal,
    LearnedScale,
    apply_kronecker,
    cayley,
    kronecker_factors,
    rotation_start,
    smooth_scale,
)

D = 48


def perturb(module, size=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return module


TRANSFORMS = {
    "scale": lambda: LearnedScale(torch.rand(D, generator=torch.Generator().manual_seed(1)) + 0.01),
    "kronecker": lambda: LearnedKronecker(D),
    "kronecker_identity": lambda: LearnedKronecker(D, init="identity"),
    "kronecker_random": lambda: LearnedKronecker(D, init="random_orthogonal"),
    "affine": lambda: LearnedKronecker(D, affine=True),
    "orthogonal": lambda: LearnedOrthogonal(D),
    "hadamard": lambda: FixedHadamard(D),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_product_is_unchanged_before_and_after_training(name, dtype, tolerance):
    torch.manual_seed(0)
    transform = TRANSFORMS[name]().to(dtype)
    x, w = torch.randn(3, 5, D, dtype=dtype), torch.randn(7, D, dtype=dtype)
    for _ in range(2):
        m = transform.matrices()
        y = transform(x, m) @ transform.weight_side(w, m).T
        assert (y - x @ w.T).norm() / (x @ w.T).norm() < tolerance
        perturb(transform)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_baked_transform_has_the_same_values(name):
    torch.manual_seed(0)
    transform = perturb(TRANSFORMS[name]())
    baked = transform.bake()
    x, w = torch.randn(3, 5, D), torch.randn(7, D)
    m = transform.matrices()
    assert torch.allclose(baked(x), transform(x, m), atol=1e-4, rtol=1e-4)
    assert torch.allclose(baked.weight_side(w).float(), transform.weight_side(w, m), atol=1e-4, rtol=1e-4)
    exact = baked(x.double()) @ baked.weight_side(w).T
    assert (exact - x.double() @ w.double().T).norm() / exact.norm() < 1e-10
    frozen = baked(x).clone()
    perturb(transform, seed=5)
    assert torch.equal(baked(x), frozen)  # no shared memory


def test_cayley_is_orthogonal_starts_at_the_identity_and_has_the_right_gradient():
    torch.manual_seed(0)
    assert torch.equal(cayley(torch.zeros(2, 5, 5)), torch.eye(5).expand(2, 5, 5))
    r = cayley(torch.randn(3, 16, 16) * 5)
    assert (r @ r.mT - torch.eye(16)).abs().max() < 1e-5
    p = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cayley, (p,))
    a = p.detach().tril(-1)
    k, eye = (a - a.mT) / 2, torch.eye(4, dtype=torch.float64)
    assert torch.allclose(cayley(p), (eye - k) @ torch.linalg.inv(eye + k))
    turn = torch.zeros(2, 2)
    turn[1, 0] = 1e-3
    assert cayley(turn)[0, 1].abs().item() == pytest.approx(1e-3, rel=1e-3)


def test_kronecker_is_the_dense_product_and_stays_a_rotation_while_it_trains():
    torch.manual_seed(0)
    rotation = LearnedKronecker(D)
    optimizer = torch.optim.AdamW(rotation.parameters(), lr=5e-2)
    x, y = torch.randn(64, D), torch.randn(64, D)
    for _ in range(30):
        loss = (rotation(x, rotation.matrices()) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    left, right, *_ = rotation.matrices()
    dense = torch.kron(left, right)
    assert (dense.T @ dense - torch.eye(D)).abs().max() < 1e-5
    assert torch.allclose(rotation(x, rotation.matrices()), x @ dense, atol=1e-5)
    assert torch.allclose(apply_kronecker(x, left, right), x @ dense, atol=1e-5)
    assert (left - rotation.left_start).abs().max() > 1e-2


def test_affine_kronecker_trains_its_singular_values():
    torch.manual_seed(0)
    rotation = LearnedKronecker(D, affine=True)
    left, *_ = rotation.matrices()
    assert torch.allclose(left.T @ left, torch.eye(6), atol=1e-5)
    rotation(torch.randn(4, D), rotation.matrices()).square().sum().backward()
    assert rotation.left_log_values.grad.abs().min() > 0
    perturb(rotation)
    left, _, inverse, _ = rotation.matrices()
    assert torch.allclose(left.T @ inverse, torch.eye(6), atol=1e-5)
    assert (left.T @ left - torch.eye(6)).abs().max() > 0.05


def test_factor_sizes():
    expected = {1920: (40, 48), 3072: (48, 64), 7680: (80, 96), 12288: (96, 128), 256: (16, 16)}
    assert {d: kronecker_factors(d) for d in expected} == expected
    with pytest.raises(AttarError, match="no two factors"):
        LearnedKronecker(53)


@pytest.mark.parametrize("init", ["auto", "identity", "random_orthogonal", "hadamard"])
def test_starts_are_orthogonal_and_repeatable(init):
    start = rotation_start(48, init, torch.Generator().manual_seed(3))
    assert torch.allclose(start.T @ start, torch.eye(48, dtype=torch.float64), atol=1e-12)
    assert torch.equal(start, rotation_start(48, init, torch.Generator().manual_seed(3)))
    if init in ("auto", "hadamard"):
        assert torch.allclose(start.abs(), torch.full_like(start, 48**-0.5))


def test_a_size_without_a_hadamard_matrix():
    q = rotation_start(6, "auto", torch.Generator().manual_seed(0))
    assert torch.allclose(q.T @ q, torch.eye(6, dtype=torch.float64), atol=1e-12)
    with pytest.raises(AttarError, match="order 6"):
        rotation_start(6, "hadamard")
    with pytest.raises(AttarError, match="unknown start"):
        rotation_start(8, "sylvester")


def test_smooth_scale_balances_both_sides_and_survives_dead_channels():
    torch.manual_seed(0)
    x, w = torch.rand(8) * 10 + 0.1, torch.rand(8) + 0.1
    c = smooth_scale(x, w)
    assert torch.allclose(x / c, w * c)  # α = 0.5 gives both sides the same maximum
    assert torch.allclose(smooth_scale(x, w, alpha=1.0), x)
    x[2], w[5] = 0, 0
    c = smooth_scale(x, w)
    live = torch.tensor([i not in (2, 5) for i in range(8)])
    neutral = c[live].log().mean().exp()
    assert torch.allclose(c[[2, 5]], neutral.expand(2))
    assert torch.equal(smooth_scale(torch.zeros(4), torch.ones(4)), torch.ones(4))
    assert smooth_scale(torch.full((2,), 1e-20), torch.ones(2)).min() >= 1e-5
    with pytest.raises(AttarError, match="finite"):
        smooth_scale(torch.tensor([float("nan")]), torch.ones(1))


def test_a_scale_stays_positive():
    scale = perturb(LearnedScale(torch.tensor([1e-3, 1.0, 50.0])), size=20.0)
    assert (scale.matrices()[0] > 0).all()
    with pytest.raises(AttarError, match="positive"):
        LearnedScale(torch.tensor([1.0, 0.0]))
