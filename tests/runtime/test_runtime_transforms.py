"""Every transform leaves x Wᵀ alone, its fast path equals its matrix, and its inverse is one."""

from __future__ import annotations

import pytest
import torch

from attar.errors import AttarError
from attar.runtime.block_rotations import block_width
from attar.runtime.hadamard import base_order, hadamard_base, sylvester, walsh_hadamard
from attar.runtime.transforms import (
    BlockRotations,
    ChannelScale,
    ChannelShift,
    Dense,
    Hadamard,
    Kronecker,
    restore_weight,
    transform_from_config,
    transform_weight,
)

WIDTHS = [2, 4, 12, 20, 28, 36, 40, 60, 64, 96, 100, 104, 108, 140, 320, 768, 1152, 1536, 3072]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def orthogonal(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=generator(seed)))[0]


def blocks(size, stages, d=96):
    rotations = torch.stack([orthogonal(size, i) for i in range(stages * d // size)])
    orders = [torch.randperm(d, generator=generator(i)) for i in range(stages - 1)]
    orders = torch.stack(orders) if orders else torch.empty(0, d, dtype=torch.int32)
    return BlockRotations(rotations.view(stages, -1, size, size), orders)


def examples(d=96):
    left, right = orthogonal(8, 1), orthogonal(12, 2)
    affine = Kronecker(left @ torch.diag(torch.linspace(0.5, 2, 8)), right)
    scale = ChannelScale(torch.rand(d, generator=generator()) + 0.1)
    return {
        "scale": [scale],
        "hadamard": [Hadamard.random(d, generator())],
        "block hadamard": [Hadamard(torch.ones(d), block=32)],
        "kronecker": [Kronecker(left, right)],
        "affine": [affine],
        "block rotations": [blocks(8, 3)],
        "one block rotation": [blocks(32, 1)],
        "dense": [Dense(torch.randn(d, d, generator=generator(3)) + 10 * torch.eye(d))],
        "all": [scale, Hadamard.random(d, generator(4)), affine, blocks(16, 2), Dense(orthogonal(d, 5))],
    }


@pytest.mark.parametrize("name", examples())
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_linear_is_unchanged(name, dtype, tolerance):
    transforms = examples()[name]
    x = torch.randn(3, 5, 96, generator=generator(7), dtype=dtype)
    weight = torch.randn(11, 96, generator=generator(8), dtype=dtype)
    y = x
    for transform in transforms:
        y = transform(y)
    assert y.dtype == dtype
    result, expected = y @ transform_weight(transforms, weight).to(dtype).T, x @ weight.T
    assert float((result - expected).norm() / expected.norm()) < tolerance
    restored = restore_weight(transforms, transform_weight(transforms, weight))
    torch.testing.assert_close(restored, weight.double(), rtol=1e-9, atol=1e-9)


def test_a_shift_moves_into_the_bias():
    z = torch.randn(96, generator=generator(1)) * 3
    shift, rotation = ChannelShift(z), Hadamard.random(96, generator(2))
    assert shift.shift.dtype == torch.float16 and torch.equal(shift.shift, z.half())
    x = torch.randn(5, 96, generator=generator(3), dtype=torch.float64)
    weight = torch.randn(7, 96, generator=generator(4), dtype=torch.float64)
    y = rotation(shift(x)) @ transform_weight([shift, rotation], weight).T + weight @ shift.shift.double()
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        restore_weight([shift, rotation], transform_weight([rotation], weight)), weight
    )
    assert shift.to(torch.bfloat16).shift.dtype == torch.float16
    assert ChannelShift(torch.full((2,), -1e9)).shift.isfinite().all()
    with pytest.raises(AttarError, match="finite"):
        ChannelShift(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("name", examples())
def test_config_rebuilds_the_shapes(name):
    for transform in examples()[name]:
        empty = transform_from_config(transform.config(), 96)
        assert empty.config() == transform.config()
        state = transform.state_dict()
        assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in state.items()}
        assert all(v.is_meta for v in empty.state_dict().values())
        filled = transform_from_config(transform.config(), 96, device="cpu")
        filled.load_state_dict(state)
        x = torch.randn(2, 96, generator=generator())
        assert torch.equal(filled(x), transform(x))


@pytest.mark.parametrize("d", WIDTHS)
def test_hadamard_is_orthogonal_and_spreads(d):
    transform = Hadamard.random(d, generator())
    rotation = transform(torch.eye(d, dtype=torch.float64))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-12)
    nonzero = rotation[rotation != 0]
    torch.testing.assert_close(nonzero.abs(), torch.full_like(nonzero, transform.block**-0.5))
    assert nonzero.numel() == d * transform.block
    assert transform.block == (d if d != 100 else 4)


@pytest.mark.parametrize("n", [1, 2, 4, 32, 64, 128, 512])
def test_walsh_hadamard_is_the_sylvester_matrix(n):
    dense = torch.tensor([[1.0 - 2 * ((i & j).bit_count() % 2) for j in range(n)] for i in range(n)]).double()
    assert torch.equal(sylvester(n, dtype=torch.float64), dense)
    x = torch.randint(-8, 8, (3, n), generator=generator()).double()
    assert torch.equal(walsh_hadamard(x), x @ dense)


@pytest.mark.parametrize("d", [12, 96, 320, 768])
def test_fast_hadamard_is_the_kronecker_product(d):
    transform = Hadamard.random(d, generator())
    order = base_order(d)
    dense = torch.kron(hadamard_base(order).double(), sylvester(d // order, dtype=torch.float64))
    x = torch.randn(4, d, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(transform(x), (x * transform.signs) @ dense.T / d**0.5, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [12, 20, 28, 36, 44, 60, 76, 84, 104, 108, 140])
def test_paley_matrices(order):
    h = hadamard_base(order).long()
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.long))
    assert (h.abs() == 1).all()


def test_base_orders():
    expected = {1: 1, 64: 1, 96: 12, 320: 20, 896: 28, 2304: 36, 1920: 60, 13824: 108, 8960: 140, 100: None}
    assert {n: base_order(n) for n in expected} == expected
    with pytest.raises(AttarError, match="order 92"):
        hadamard_base(92)


def test_random_signs_follow_the_generator():
    a, b, c = (Hadamard.random(64, generator(seed)).signs for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.dtype == torch.int8


def test_hadamard_removes_an_outlier_channel():
    x = torch.randn(256, 768, generator=generator())
    x[:, 5] *= 50

    def kurtosis(x):
        return float(((x - x.mean()) ** 4).mean() / x.var() ** 2)

    assert kurtosis(x) > 100 and kurtosis(Hadamard.random(768, generator())(x)) < 5


def test_block_rotations_are_their_matrices_one_after_the_other():
    """Behind a permutation channel i is the one that was channel order[i]."""
    transform, x = blocks(8, 2), torch.randn(5, 96, generator=generator(), dtype=torch.float64)
    first, second = (torch.block_diag(*stage) for stage in transform.rotations.double())
    expected = (x @ first)[:, transform.orders[0].long()] @ second
    torch.testing.assert_close(transform(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "d, block", [(1536, 128), (8960, 128), (192, 96), (96, 96), (100, 100), (13824, 128), (254, 127)]
)
def test_blocks_have_the_largest_width_that_fits(d, block):
    assert block_width(d) == block


@pytest.mark.parametrize("sizes", [(8, 12), (12, 8), (1, 96), (40, 48)])
def test_kronecker_is_the_dense_product(sizes):
    left, right = (torch.randn(n, n, generator=generator(n)) + 3 * torch.eye(n) for n in sizes)
    x = torch.randn(5, sizes[0] * sizes[1], generator=generator(), dtype=torch.float64)
    expected = x @ torch.kron(left.double(), right.double())
    torch.testing.assert_close(Kronecker(left, right)(x), expected, rtol=1e-10, atol=1e-8)


def test_transforms_run_in_float32_and_do_not_alias():
    source = torch.ones(8)
    transform = ChannelScale(source)
    source.fill_(2)
    assert float(transform.scale[0]) == 1
    assert transform(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    "build",
    [
        lambda: ChannelScale(torch.tensor([1.0, 0.0])),
        lambda: ChannelScale(torch.tensor([1.0, float("nan")])),
        lambda: Dense(torch.zeros(3, 3)),
        lambda: Dense(torch.ones(3, 4)),
        lambda: Kronecker(torch.eye(2), torch.full((2, 2), float("inf"))),
        lambda: Hadamard(torch.ones(7)),
        lambda: Hadamard(torch.full((8,), 2.0)),
        lambda: Hadamard(torch.ones(96), order=20),
        lambda: Hadamard(torch.ones(96), block=40),
        lambda: BlockRotations(torch.eye(4).repeat(2, 2, 1, 1), torch.zeros(1, 8, dtype=torch.int32)),
        lambda: BlockRotations(torch.eye(4).repeat(2, 2, 1, 1), torch.arange(8)[None].repeat(2, 1)),
        lambda: BlockRotations(torch.zeros(1, 2, 4, 4), torch.empty(0, 8, dtype=torch.int32)),
        lambda: BlockRotations(torch.eye(4), torch.empty(0, 4, dtype=torch.int32)),
        lambda: transform_from_config({"kind": "block_rotations", "block": 3, "stages": 2}, 8),
        lambda: transform_from_config({"kind": "warp"}, 8),
        lambda: transform_from_config({"kind": "dense", "rank": 2}, 8),
        lambda: transform_from_config({"kind": "kronecker", "left": 3, "right": 3}, 8),
    ],
)
def test_invalid_transforms(build):
    with pytest.raises(AttarError):
        build()
