"""The compiled kernels: the integers of the reference, bit for bit, on every instruction set; one operator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layers import DTYPES, act_formats, assert_same, bits, both, generator, make, seeds, wan_block

from attar.errors import AttarError
from attar.runtime import PackedLinear, use_backend
from attar.runtime.cpu.library import library
from attar.runtime.formats import integer_range
from attar.runtime.ops import dequantized
from attar.runtime.packing import pack
from attar.runtime.transforms import ChannelScale, ChannelShift, Dense, Hadamard, Kronecker

try:
    LEVELS = list(library().levels)
except AttarError as error:
    pytest.skip(f"no kernels: {error.what}", allow_module_level=True)


@given(
    seed=seeds,
    level=st.sampled_from(LEVELS),
    weight_bits=bits,
    act_bits=bits,
    rows=st.integers(1, 40),
    out_features=st.integers(1, 100),
    in_features=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    clip=st.sampled_from([None, (0.97, 0.9), (0.2, 1.3), (0.0, 0.5)]),
    size=st.sampled_from([1.0, 1e-7, 1e3]),
    act_format=act_formats,
    shift=st.sampled_from([None, 0.0, 2.0]),
)
@settings(deadline=None, max_examples=150)
def test_equal_to_the_reference_bit_for_bit(
    seed,
    level,
    weight_bits,
    act_bits,
    rows,
    out_features,
    in_features,
    dtype,
    bias,
    clip,
    size,
    act_format,
    shift,
):
    chain = (
        [] if shift is None else [ChannelShift(torch.randn(in_features, generator=generator(seed)) + shift)]
    )
    layer = make(
        out_features, in_features, weight_bits, act_bits, seed=seed, bias=bias, clip=clip, chain=chain,
        act_format=act_format,
    ).to(dtype)  # fmt: skip
    x = torch.randn(rows, in_features, generator=generator(seed)).mul(size).to(dtype)
    with library().use_kernels(level):
        assert_same(*both(layer, x))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("act_bits", range(2, 9))
def test_sums_are_exact_at_every_width(level, weight_bits, act_bits):
    """Unit scales: the output is the integer sum, here below 2^24, so that float32 holds it."""
    low, high = integer_range(act_bits)
    x = torch.randint(low, high + 1, (17, 203), generator=generator(weight_bits)).float()
    x[:, 0] = high  # the step size is one
    x[3], x[4] = high, low
    x[4, 0] = high
    layer = make(
        35, 203, weight_bits, act_bits, seed=act_bits, bias=False, clip=(0.0, 1.0) if low == 0 else None
    )
    layer.weight_scale.fill_(1)
    clipped = x.clamp(min=-high)
    with library().use_kernels(level), torch.no_grad(), use_backend("cpu"):
        y = layer(clipped)
    assert torch.equal(y.long(), clipped.long() @ layer.unpacked().long().T)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("act_bits", range(2, 9))
def test_sums_of_extreme_codes_are_exact(level, weight_bits, act_bits):
    """Products of one sign, as large as they come: sums that are kept in 16 bits for a while overflow first."""
    low, high = integer_range(weight_bits)
    codes = torch.full((35, 203), high, dtype=torch.int8)
    codes[1], codes[2, ::2], codes[3, 1::2] = low, low, low
    layer = PackedLinear.from_codes(
        codes, torch.ones(35, 1), weight_bits, act_bits=act_bits, act_format="full_range"
    )
    x = torch.full((6, 203), -1.0)
    x[1], x[2, ::2], x[3, 1::2], x[4, 40:] = 1.0, 1.0, 1.0, 1.0
    with library().use_kernels(level):
        assert_same(*both(layer, x))


@pytest.mark.parametrize("level", LEVELS)
def test_the_longest_sums(level):
    """Extreme codes at the greatest width come within 2^15 of the end of 32 bits."""
    width = 2**17 - 1
    codes = torch.full((3, width), -128, dtype=torch.int8)
    codes[1], codes[2, ::2] = 127, 127
    layer = PackedLinear.from_codes(codes, torch.ones(3, 1), 8, act_bits=8, act_clip=(2.0, 1e-9))
    x = torch.full((2, width), -1.0)
    x[1, ::3] = 1.0
    with library().use_kernels(level):
        assert_same(*both(layer, x))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("clip", [None, (0.9, 0.95)])
@pytest.mark.parametrize("act_format", ["int", "full_range"])
def test_extreme_rows(level, clip, act_format):
    layer = make(40, 96, 4, 6, clip=clip, act_format=act_format)
    x = torch.randn(8, 96, generator=generator(1))
    x[0] = 0
    x[1, 5] = 1e30
    x[2, 7] = float("nan")
    x[3, 9], x[4, 11] = float("inf"), -float("inf")
    x[5] = torch.finfo(torch.float32).max
    x[6] = x[6].abs() + 1  # no zero between its extremes
    with library().use_kernels(level):
        y, expected = both(layer, x)
        assert_same(y, expected)
        assert torch.equal(y[0], layer.bias) and y[2].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("spread", [1.0, 5.0, 20.0])
def test_numbers_beside_the_middle_of_two_codes(level, spread):
    """Quotients of half a step, and some roundings more and less: where the kernels do not divide, they must be as
    exact as a division. Rows of all magnitudes, the last ones too large for an inverse that is a normal number."""
    for act_bits in range(2, 9):
        most = 2 ** (act_bits - 1) - 1
        absmax = torch.exp(torch.randn(40, 1, generator=generator(act_bits)) * spread)
        absmax[-4:] = 3e38 * torch.rand(4, 1, generator=generator(act_bits))
        half = torch.randint(-most, most, (40, 256), generator=generator(act_bits)) + 0.5
        off = torch.randint(-2, 3, half.shape, generator=generator(act_bits))
        x = half * (absmax / most) * (1 + off * 2.0**-24)
        x[:, :1] = absmax
        layer = PackedLinear.from_codes(
            torch.eye(256, dtype=torch.int8), torch.ones(256, 1), 8, act_bits=act_bits
        )
        with library().use_kernels(level):
            assert_same(*both(layer, x))


@given(
    seeds, st.sampled_from([8, 16, 60, 64, 96, 560]), bits, st.sampled_from(["hadamard", "kronecker", "both"])
)
@settings(deadline=None, max_examples=30)
def test_rotations_differ_by_rounding_only(seed, width, act_bits, rotation):
    """The order of the sums in a rotation is free: few codes may fall on the other side of a half."""
    left = torch.linalg.qr(torch.randn(width // 4, width // 4, generator=generator(seed)))[0]
    chain = [ChannelScale(torch.rand(width, generator=generator(seed)) + 0.5)]
    if rotation != "kronecker":
        chain.append(Hadamard.random(width, generator(seed)))
    if rotation != "hadamard":
        chain.append(Kronecker(left, torch.eye(4) * 1.5 + 0.1))
    layer = make(48, width, 4, act_bits, seed=seed, chain=chain, clip=(0.95, 0.95))
    x = torch.randn(30, width, generator=generator(seed))
    y, expected = both(layer, x)
    step = layer(x).detach().abs().max() / 2 ** (act_bits - 1)
    assert float((y - expected).abs().max()) <= float(step)
    close = torch.isclose(y, expected, rtol=1e-4, atol=1e-4).all(-1)
    assert close.float().mean() > (
        0.5 if library().kernels == "amx-int8" else 0.8
    )  # it splits numbers in two
    with library().use_kernels("scalar"):
        torch.testing.assert_close(both(layer, x)[0][close], expected[close], rtol=1e-4, atol=float(step))


@given(
    seeds,
    st.sampled_from(LEVELS),
    st.integers(2, 40),
    st.integers(2, 70),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from([4, 6, 7, 8]),
)
@settings(deadline=None, max_examples=80)
def test_codes_are_those_of_the_exact_rotation_or_their_neighbours(
    seed, level, left, right, scaled, dtype, act_bits
):
    """Outputs are the codes times the step: within half a step, and a rounding of the row's length, of float64."""
    width = left * right
    factors = [torch.linalg.qr(torch.randn(n, n, generator=generator(seed + n)))[0] for n in (left, right)]
    rotation = Kronecker(*factors)
    scale = [ChannelScale(torch.rand(width, generator=generator(seed)) + 0.5)] if scaled else []
    chain = [*scale, rotation]
    layer = PackedLinear.from_codes(
        torch.eye(width, dtype=torch.int8), torch.ones(width, 1), 8, act_bits=act_bits, transforms=chain
    )
    x = torch.randn(20, width, generator=generator(seed)).to(dtype)
    exact = x.double() / scale[0].scale.double() if scale else x.double()
    exact = rotation.left.double().T @ exact.unflatten(-1, (left, right)) @ rotation.right.double()
    exact = exact.flatten(1)
    with library().use_kernels(level), torch.no_grad(), use_backend("cpu"):
        y = layer(x.float())
    step = exact.abs().amax(-1, keepdim=True) / (2 ** (act_bits - 1) - 1)
    coarse = level == "amx-int8" and act_bits <= 6  # matrices of bfloat16
    off = 2**-7 if coarse else 2**-16 + 2**-21 * 128
    bound = step * 0.5 + off * exact.norm(dim=-1, keepdim=True)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("act_bits", [4, 6, 8])
def test_the_rounding_of_a_rotation_is_nothing_beside_that_of_its_codes(level, act_bits):
    """The error of the codes, of rotations in float64 and of the kernels' own: less than 2 % more of it."""
    factors = [torch.linalg.qr(torch.randn(n, n, generator=generator(n)))[0] for n in (32, 48)]
    layer = PackedLinear.from_codes(
        torch.eye(1536, dtype=torch.int8),
        torch.ones(1536, 1),
        8,
        act_bits=act_bits,
        transforms=[Kronecker(*factors)],
    )
    x = torch.randn(100, 1536, generator=generator(1))
    left, right = (factor.double() for factor in factors)
    exact = (left.T @ x.double().unflatten(-1, (32, 48)) @ right).flatten(1)
    step = exact.abs().amax(-1, keepdim=True) / (2 ** (act_bits - 1) - 1)
    least = ((exact / step).round() * step - exact).square().mean()
    with library().use_kernels(level), torch.no_grad(), use_backend("cpu"):
        y = layer(x).double()
    assert (y - exact).square().mean() < 1.02 * least


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [1e-20, 1e-10, 1.0, 1e10, 1e20])
def test_scales_and_shifts_are_exact_without_a_division(level, size):
    """Quotients by their inverses and remainders, of scales that allow it and of such as do not."""
    scale = ChannelScale((torch.rand(203, generator=generator(1)) + 0.01) * size)
    shift = ChannelShift(torch.randn(203, generator=generator(2)))
    x = torch.randn(40, 203, generator=generator(3)) * torch.exp(
        torch.randn(40, 1, generator=generator(4)) * 5
    )
    for chain in ([scale], [shift, scale], [scale, shift], [shift, scale, scale]):
        layer = make(30, 203, 8, 8, chain=chain)
        with library().use_kernels(level):
            assert_same(*both(layer, x))
            assert_same(*both(layer, x.bfloat16()))


def test_a_channel_scale_alone_is_exact_and_a_dense_matrix_stays_in_torch():
    scale = ChannelScale(torch.rand(72, generator=generator(3)) + 0.5)
    x = torch.randn(9, 72, generator=generator(4))
    assert_same(*both(make(20, 72, 4, 6, chain=[scale]), x))
    dense = Dense(torch.linalg.qr(torch.randn(72, 72, generator=generator(5)))[0])
    assert_same(*both(make(20, 72, 4, 6, chain=[dense, scale]), x))
    y, expected = both(make(20, 72, 8, 8, chain=[scale, dense]), x.bfloat16())
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


@given(
    seeds, st.sampled_from(LEVELS), bits, st.integers(1, 40), st.sampled_from([None, 3, 24]), st.booleans()
)
@settings(deadline=None, max_examples=40)
def test_weights_alone(seed, level, weight_bits, out_features, group_size, bias):
    layer = make(out_features, 72, weight_bits, None, seed=seed, group_size=group_size, bias=bias)
    x = torch.randn(5, 72, generator=generator(seed))
    with library().use_kernels(level):
        for dtype in DTYPES:
            panel = torch.empty(out_features, 72, dtype=dtype)
            library().dequantize(layer.codes, layer.weight_scale, weight_bits, 0, out_features, panel)
            whole = dequantized(layer.codes, layer.weight_scale, weight_bits, 72)
            assert torch.equal(panel, whole.to(dtype))
        torch.testing.assert_close(*both(layer, x), rtol=1e-5, atol=1e-5)


def test_weights_alone_over_several_panels(monkeypatch):
    monkeypatch.setattr("attar.runtime.cpu.library._PANEL_BYTES", 1)
    layer = make(200, 64, 4, None, group_size=16).to(torch.bfloat16)
    x = torch.randn(3, 4, 64, generator=generator(1)).bfloat16()
    torch.testing.assert_close(*both(layer, x), rtol=0.02, atol=0.02)


def test_several_threads_and_several_blocks_of_rows():
    layer = make(300, 2048, 8, 8)
    x = torch.randn(9000, 2048, generator=generator(2)).bfloat16()
    with torch.no_grad(), use_backend("cpu"):
        expected = layer(x[-200:])
        before = torch.get_num_threads()
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert torch.equal(layer(x)[-200:], expected)
        finally:
            torch.set_num_threads(before)


def test_views_and_empty_batches():
    layer = make(24, 48, 4, 8)
    x = torch.randn(48, 6, 5, generator=generator(1))
    for view in (x.permute(2, 1, 0), x[:, ::2, :3].permute(1, 2, 0), x.permute(1, 2, 0)[:0]):
        assert_same(*both(layer, view))
    assert both(layer, torch.zeros(3, 0, 48))[0].shape == (3, 0, 24)
    assert both(layer, x[:, 0, 0])[0].shape == (24,)


def test_inputs_that_do_not_fit():
    layer = make(24, 96, 4, 8)
    with pytest.raises(AttarError, match="does not fit"):
        layer(torch.zeros(2, 95))
    arguments = (layer.codes, layer.weight_scale, None, None, 4, 8, [], [])
    with use_backend("cpu"), pytest.raises(AttarError, match="does not fit"):
        torch.ops.attar.packed_linear(torch.zeros(2, 90), *arguments)
    with use_backend("cpu"), pytest.raises(AttarError, match="take no torch"):
        layer(torch.zeros(2, 96, dtype=torch.float64))
    assert layer(torch.zeros(2, 96, dtype=torch.float64)).dtype == torch.float64
    layer = make(24, 96, 4, 8, chain=[ChannelScale(torch.ones(96))])
    layer.transforms[0].to("meta")
    with pytest.raises(AttarError, match="not on one device"):
        layer(torch.zeros(2, 96))


@pytest.mark.parametrize("act_bits, group_size", [(6, None), (None, 16)])
def test_the_operator_obeys_the_rules_of_torch(act_bits, group_size):
    chain = [ChannelScale(torch.ones(32) * 2), Hadamard.random(32, generator(1))] if act_bits else []
    layer = make(24, 32, 4, act_bits, chain=chain, group_size=group_size)
    operands = [tensor for transform in chain for tensor in transform.operands()]
    torch.library.opcheck(
        torch.ops.attar.packed_linear.default,
        (
            *(torch.randn(2, 5, 32), layer.codes, layer.weight_scale, layer.bias.detach(), None),
            *(4, act_bits, [transform.kind for transform in chain], operands),
        ),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_block_compiles_without_graph_break(compiler):
    block, call = wan_block()
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*call), block(*call), rtol=1e-3, atol=1e-2)


def test_gradients_reach_what_lies_before_the_layer():
    for layer in (make(24, 32, 8, 8), make(24, 32, 8, None, group_size=8)):
        x = torch.randn(4, 32, requires_grad=True)
        with use_backend("cpu"):
            layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, -1))


def test_codes_stay_packed():
    layer = make(16, 64, 4, 8)
    both(layer, torch.randn(3, 64))
    assert layer.codes.shape == (16, 32) and torch.equal(layer.codes, pack(layer.unpacked(), 4))
