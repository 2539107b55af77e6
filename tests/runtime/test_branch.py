"""The low-rank branch of a packed layer: added to the sums before GELU and the only rounding, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layers import DTYPES, assert_same, bits, both, generator, make, seeds

from attar.errors import AttarError
from attar.runtime import PackedLinear, use_backend
from attar.runtime.backend import backend_name
from attar.runtime.cpu.library import library
from attar.runtime.formats import integer_range
from attar.runtime.rows import RowKind

compiled = pytest.mark.skipif(backend_name("cpu") != "cpu", reason="no compiled kernels")


def with_branch(layer, rank, *, seed=0, size=0.1):
    """The layer with a random branch."""
    down = torch.randn(rank, layer.in_features, generator=generator(seed + 3)) * size
    up = torch.randn(layer.out_features, rank, generator=generator(seed + 4)) * size
    return PackedLinear.from_codes(
        layer.unpacked(), layer.weight_scale, layer.weight_bits, layer.bias, layer.act_bits,
        group_size=layer.group_size, branch=(down, up),
    )  # fmt: skip


def within_rounding(y, expected, layer, x):
    """Products and sums of the branch in float32, in any order, then one rounding."""
    low = F.linear(x, layer.low_rank_in.to(x.dtype)).float()
    most = F.linear(low.abs(), layer.low_rank_out.float().abs())
    before = expected.float().abs() + most
    bound = 2**-22 * (layer.low_rank + 1) * before + torch.finfo(x.dtype).eps * expected.float().abs() + 1e-7
    assert y.dtype == expected.dtype and y.shape == expected.shape
    assert ((y.float() - expected.float()).abs() <= bound).all()


@compiled
@given(
    seed=seeds,
    weight_bits=bits,
    act_bits=bits,
    rows=st.integers(1, 70),
    out_features=st.integers(1, 100),
    in_features=st.integers(1, 200),
    rank=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    gelu=st.sampled_from([None, "none", "tanh"]),
)
@settings(deadline=None, max_examples=80)
def test_the_reference_within_a_rounding(
    seed, weight_bits, act_bits, rows, out_features, in_features, rank, dtype, bias, gelu
):
    layer = with_branch(make(out_features, in_features, weight_bits, act_bits, seed=seed, bias=bias), rank)
    layer, x = layer.to(dtype), torch.randn(rows, in_features, generator=generator(seed)).to(dtype)
    with torch.no_grad(), use_backend("reference"):
        expected, before = layer(x, gelu=gelu), layer(x)
    for level in library().levels:
        with torch.no_grad(), library().use_kernels(level), use_backend("cpu"):
            y = layer(x, gelu=gelu)
            if gelu is None:
                within_rounding(y, expected, layer, x)
            else:
                size = (before.float().abs() + 1).amax() * (1 + layer.low_rank)
                torch.testing.assert_close(
                    y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * float(size)
                )


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 32, 33])
def test_a_branch_of_zeros_changes_no_bit(dtype, rank):
    plain = make(70, 96, 4, 6)
    layer, x = (
        with_branch(plain, rank, size=0).to(dtype),
        torch.randn(45, 96, generator=generator(1)).to(dtype),
    )
    plain = plain.to(dtype)
    for level in library().levels:
        with library().use_kernels(level), use_backend("cpu"), torch.no_grad():
            for gelu in (None, "tanh"):
                assert_same(layer(x, gelu=gelu), plain(x, gelu=gelu))


@compiled
def test_the_branch_alone_is_exact_where_its_numbers_are():
    """Small integers are exact in bfloat16, so is their product: every row and output has what belongs to it."""
    codes, scale = torch.zeros(67, 40, dtype=torch.int8), torch.ones(67, 1)
    down = torch.randint(-3, 4, (5, 40), generator=generator(1)).float()
    up = torch.randint(-3, 4, (67, 5), generator=generator(2)).float()
    x = torch.randint(-1, 2, (71, 40), generator=generator(3)).float()
    expected = x @ down.T @ up.T
    for dtype in DTYPES:
        layer = PackedLinear.from_codes(codes, scale, 8, act_bits=8, branch=(down, up)).to(dtype)
        for level in library().levels:
            with library().use_kernels(level), use_backend("cpu"), torch.no_grad():
                assert torch.equal(layer(x.to(dtype)), expected.to(dtype))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_added_before_gelu_and_rounded_once(backend, dtype):
    layer, x = (
        with_branch(make(60, 48, 4, 8), 6).to(dtype),
        torch.randn(20, 48, generator=generator(3)).to(dtype),
    )
    plain = PackedLinear.from_codes(layer.unpacked(), layer.weight_scale, 4, layer.bias, 8).float()
    with torch.no_grad(), use_backend(backend):
        low = F.linear(x, layer.low_rank_in.to(dtype)).float()
        wide = plain(x.float()) + low @ layer.low_rank_out.float().T
        expected = F.gelu(wide, approximate="tanh")
        eps = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(layer(x, gelu="tanh").float(), expected, rtol=1.01 * eps, atol=3e-6)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled)])
@pytest.mark.parametrize("gelu", [None, "tanh"])
def test_weights_alone(backend, gelu):
    layer, x = (
        with_branch(make(60, 48, 4, None, group_size=16), 6),
        torch.randn(2, 5, 48, generator=generator(3)),
    )
    with torch.no_grad(), use_backend(backend):
        expected = F.linear(x, layer.weight, layer.bias)
        expected = expected if gelu is None else F.gelu(expected, approximate=gelu)
        torch.testing.assert_close(layer(x, gelu=gelu), expected, rtol=1e-4, atol=1e-5)
        assert layer(x[:0], gelu=gelu).shape == (0, 5, 60)
        turned = x.permute(1, 0, 2)
        torch.testing.assert_close(layer(turned, gelu=gelu), layer(x, gelu=gelu).permute(1, 0, 2))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled)])
def test_rows_of_several_kinds_have_their_own_part(backend):
    kinds = [RowKind(3, "int", 25), RowKind(6, "int", 35)]
    row_kind = torch.zeros(60, dtype=torch.uint8)
    row_kind[torch.randperm(60, generator=generator(1))[:35]] = 1
    low, high = integer_range(3)
    codes = torch.randint(low, high + 1, (60, 48), generator=generator(2), dtype=torch.int8)
    branch = torch.randn(4, 48, generator=generator(3)), torch.randn(60, 4, generator=generator(4))
    scale, x = torch.rand(60, 1, generator=generator(5)) + 0.1, torch.randn(9, 48, generator=generator(6))
    whole = PackedLinear.from_codes(codes, scale, 6, act_bits=8, branch=branch)
    layer = PackedLinear.from_codes(codes, scale, 6, act_bits=8, branch=branch, rows=kinds, row_kind=row_kind)
    with torch.no_grad(), use_backend(backend):
        torch.testing.assert_close(layer(x), whole(x), rtol=1e-6, atol=1e-5)


@compiled
def test_views_and_empty_batches_and_blocks_of_rows():
    layer = with_branch(make(24, 48, 4, 8), 3)
    x = torch.randn(48, 6, 5, generator=generator(1))
    for view in (x.permute(2, 1, 0), x[:, ::2, :3].permute(1, 2, 0), x.permute(1, 2, 0)[:0], x[:, 0, 0]):
        torch.testing.assert_close(*both(layer, view), rtol=1e-6, atol=1e-5)
    layer = with_branch(make(300, 2048, 8, 8), 40).to(torch.bfloat16)
    x = torch.randn(9000, 2048, generator=generator(2)).bfloat16()  # more than one block of rows
    with torch.no_grad(), use_backend("cpu"):
        expected, before = layer(x[-200:]), torch.get_num_threads()
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                torch.testing.assert_close(layer(x)[-200:], expected, rtol=0.01, atol=0.01)
        finally:
            torch.set_num_threads(before)


def test_a_branch_that_does_not_fit():
    layer, x = make(24, 96, 4, 8), torch.zeros(5, 96)
    arguments = (layer.codes, layer.weight_scale, None, None, 4, 8, [], [], None, "int", "int", None)
    for low, up in ((torch.zeros(4, 3), torch.zeros(24, 3)), (torch.zeros(5, 3), torch.zeros(23, 3))):
        with pytest.raises(AttarError, match=r"does not fit inputs of \(5, 96\) with 24 outputs"):
            torch.ops.attar.packed_linear(x, *arguments, low, up)
    for act_bits in (6, None):
        arguments = (
            layer.codes,
            layer.weight_scale,
            None,
            None,
            4,
            act_bits,
            [],
            [],
            "tanh",
            "int",
            "int",
            None,
        )
        low, up = torch.randn(5, 3), torch.randn(24, 3)
        torch.library.opcheck(torch.ops.attar.packed_linear.default, (x, *arguments, low, up))
