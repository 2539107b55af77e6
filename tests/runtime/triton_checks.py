"""The Triton kernels against the reference: in the interpreter (TRITON_INTERPRET=1) on the CPU, else on a GPU.

Not collected by itself: test_triton.py runs it, each way in a process of its own, since Triton looks at the variable
when it is imported.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layers import (
    DTYPES,
    act_formats,
    assert_same,
    bits,
    both,
    close_to_gelu,
    generator,
    make,
    make_float8,
    seeds,
    wan_block,
)

from attar.errors import AttarError
from attar.runtime import PackedLinear, backend_description, backend_name, use_backend
from attar.runtime.formats import decode, integer_range
from attar.runtime.packing import pack
from attar.runtime.reference import quantize_tokens
from attar.runtime.transforms import ChannelScale, ChannelShift, Dense, Hadamard, Kronecker
from attar.runtime.triton import activations, products
from attar.runtime.triton.available import interpreting
from attar.runtime.triton.codes import padded_columns, planes
from attar.runtime.triton.kernels import KERNELS

DEVICE = "cpu" if interpreting() else "cuda"
FLOAT8_SUM = (
    1e-5 if interpreting() else 2**-11
)  # of the largest output: tensor cores add such products in 14 bits
CLIPS = [None, (0.97, 0.9), (0.2, 1.3), (0.0, 0.5)]
if interpreting():
    from support.interpreter import mend

    mend()


def compare(layer, x):
    """The layer's output on the kernels and on the reference, both on the CPU."""
    y, expected = both(layer.to(DEVICE), x.to(DEVICE), "triton")
    return y.cpu(), expected.cpu()


@given(
    seed=seeds,
    weight_bits=bits,
    act_bits=bits,
    rows=st.integers(1, 40),
    out_features=st.integers(1, 100),
    in_features=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    clip=st.sampled_from(CLIPS),
    shifted=st.booleans(),
    scaled=st.booleans(),
    size=st.sampled_from([1.0, 1e-7, 1e3]),
    act_format=act_formats,
)
@settings(deadline=None, max_examples=6 if interpreting() else 12)
def test_equal_to_the_reference_bit_for_bit(
    seed,
    weight_bits,
    act_bits,
    rows,
    out_features,
    in_features,
    dtype,
    bias,
    clip,
    shifted,
    scaled,
    size,
    act_format,
):
    chain = [ChannelShift(torch.randn(in_features, generator=generator(seed)))] if shifted else []
    chain += [ChannelScale(torch.rand(in_features, generator=generator(seed)) + 0.5)] if scaled else []
    layer = make(
        out_features, in_features, weight_bits, act_bits, seed=seed, bias=bias, clip=clip, chain=chain,
        act_format=act_format,
    )  # fmt: skip
    steps = [(t.kind, t.operands()) for t in chain]
    assert KERNELS.fusable(steps, torch.empty(1, in_features, dtype=dtype)) == len(chain)
    x = torch.randn(rows, in_features, generator=generator(seed)).mul(size)
    assert_same(*compare(layer.to(dtype), x.to(dtype)))


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("act_bits", [2, 5, 8])
def test_sums_are_exact_at_every_width(weight_bits, act_bits):
    """Unit scales: the output is the integer sum, here below 2^24, so that float32 holds it."""
    _, high = integer_range(act_bits)
    x = torch.randint(-high, high + 1, (17, 203), generator=generator(weight_bits)).float()
    x[:, 0] = high  # the step size is one
    layer = make(35, 203, weight_bits, act_bits, seed=act_bits, bias=False).to(DEVICE)
    layer.weight_scale.fill_(1)
    with torch.no_grad(), use_backend("triton"):
        y = layer(x.to(DEVICE)).cpu()
    assert torch.equal(y.long(), x.long() @ layer.unpacked().cpu().long().T)


@pytest.mark.parametrize(
    "config, weight_bits",
    [
        (products.INTEGER[0], 4),
        *(pytest.param(c, 4, marks=pytest.mark.slow) for c in products.INTEGER[1:7]),
        *((c, 4) for c in products.INTEGER[7:]),
        (products.INTEGER[-1], 8),
        (products.INTEGER[-2], 3),
    ],
)
def test_every_tile_size_gives_the_same_integers(config, weight_bits, monkeypatch):
    """Several tiles each way, of which the last are ragged; rows of whole tiles and a ragged one."""
    monkeypatch.setattr(products, "choose", lambda problem, candidates, run, device: config)
    for width in (512, 277)[config.rows > 128 :]:
        layer = make(config.outputs + 5, width, weight_bits, 8, seed=weight_bits)
        x = torch.randn(config.rows + 3, width, generator=generator(7))
        assert_same(*compare(layer, x))


@pytest.mark.parametrize("config", products.FLOATING)
def test_every_tile_size_gives_the_same_product(config, monkeypatch):
    monkeypatch.setattr(products, "choose", lambda problem, candidates, run, device: config)
    layer = make(config.outputs + 5, 192, 4, None, group_size=32)
    x = torch.randn(config.rows + 3, 192, generator=generator(7))
    torch.testing.assert_close(*compare(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [pytest.param(16 * 8, marks=pytest.mark.slow), 16 * 11 + 3])
def test_more_tiles_of_rows_than_share_weights(rows, monkeypatch):
    smallest = min(products.INTEGER, key=lambda config: config.rows)
    monkeypatch.setattr(products, "choose", lambda problem, candidates, run, device: smallest)
    assert_same(*compare(make(150, 64, 4, 8), torch.randn(rows, 64, generator=generator(7))))


@pytest.mark.slow
def test_the_longest_sums():
    """Extreme codes at the greatest width come within 2^15 of the end of 32 bits."""
    width = 2**17 - 1
    codes = torch.full((3, width), -128, dtype=torch.int8)
    codes[1], codes[2, ::2] = 127, 127
    layer = PackedLinear.from_codes(codes, torch.ones(3, 1), 8, act_bits=8, act_clip=(2.0, 1e-9))
    x = torch.full((2, width), -1.0)
    x[1, ::3] = 1.0
    assert_same(*compare(layer, x))
    low = PackedLinear.from_codes(codes.clamp(-8, 7), torch.ones(3, 1), 4, act_bits=8, act_clip=(2.0, 1e-9))
    assert_same(*compare(low, x))


@pytest.mark.parametrize("clip", [None, (0.9, 0.95), (0.0, 0.5), (1.2, 1.3)])
@pytest.mark.parametrize("act_format", ["int", "full_range"])
def test_extreme_rows(clip, act_format):
    layer = make(40, 96, 4, 6, clip=clip, act_format=act_format)
    x = torch.randn(10, 96, generator=generator(1))
    x[0] = 0
    x[1, 5] = 1e30
    x[2, 7] = float("nan")
    x[3, 9], x[4, 11] = float("inf"), -float("inf")
    x[5] = torch.finfo(torch.float32).max
    x[6], x[7] = x[6].abs() + 1, -x[7].abs() - 1  # no zero between their extremes
    x[8, 3] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)  # a NaN below all numbers
    y, expected = compare(layer, x)
    assert_same(y, expected)
    assert torch.equal(y[0], layer.bias.cpu()) and y[2].isnan().all() and y[1].isfinite().all()
    assert y[8].isnan().all()


@given(
    seeds, st.sampled_from([8, 16, 60, 64, 96, 560]), bits, st.sampled_from(["hadamard", "kronecker", "both"])
)
@settings(deadline=None, max_examples=3 if interpreting() else 6)
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
    y, expected = compare(layer, x)
    step = float(expected.abs().max()) / 2 ** (act_bits - 1)
    assert float((y - expected).abs().max()) <= step
    assert torch.isclose(y, expected, rtol=1e-4, atol=1e-4).all(-1).float().mean() > 0.8


def rotation_of(kind, width):
    """A rotation of rows of a width, Kronecker's with factors that are neither symmetric nor of size one."""
    if kind == "hadamard":
        return Hadamard.random(width, generator(width))
    size = {16: 4, 192: 12, 240: 15, 320: 16, 640: 20, 1536: 32}[width]
    factor = [torch.linalg.qr(torch.randn(n, n, generator=generator(n)))[0] for n in (size, width // size)]
    return Kronecker(factor[0] * 1.5, factor[1] + 0.02)


@pytest.mark.parametrize("kind", ["hadamard", "kronecker"])
@pytest.mark.parametrize(
    "width, weight_bits, clip",
    [
        pytest.param(16, 4, None, marks=pytest.mark.slow),
        (192, 4, (0.9, 0.95)),
        (240, 3, None),
        pytest.param(320, 8, (0.9, 0.95), marks=pytest.mark.slow),
        pytest.param(640, 2, None, marks=pytest.mark.slow),
        (1536, 6, (0.9, 0.95)),
    ],
)
@pytest.mark.parametrize(
    "dtype, shifted",
    [
        (torch.float32, False),
        (torch.bfloat16, True),
        pytest.param(torch.float32, True, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, False, marks=pytest.mark.slow),
    ],
)
def test_a_rotation_is_computed_with_the_codes(width, weight_bits, clip, dtype, kind, shifted):
    """Hadamard bases of orders 1, 12, 60 and 20. Rows in half precision meet factors of 11 bits."""
    rotation = rotation_of(kind, width)
    scale = ChannelScale(torch.rand(width, generator=generator(width)) + 0.5)
    shifts = [ChannelShift(torch.randn(width, generator=generator(width + 1)))] if shifted else []
    chain = [*shifts, scale, rotation]
    steps = [(t.kind, t.operands()) for t in chain]
    assert KERNELS.fusable(steps, torch.empty(1, width, dtype=dtype)) == len(chain)
    number = "full_range" if shifted and width == 192 else "int"
    layer = make(40, width, weight_bits, 8, chain=chain, clip=clip, act_format=number)
    x = torch.randn(21, width, generator=generator(3)).to(dtype)
    x[2], x[3, 5], x[6] = 0, 1e6, x[6] * 1e-30
    x[4, 7], x[5, 1] = float("nan"), float("inf")
    y, expected = (out.float() for out in compare(layer, x))
    assert y[4].isnan().all() and expected[4].isnan().all() and not y[5].isfinite().any()
    keep = [row for row in range(21) if row not in (4, 5)]
    y, expected = y[keep], expected[keep]
    exact = dtype == torch.float32
    difference = (y - expected).abs().amax(1) / expected.abs().amax(1).clamp(min=1)
    assert float(difference.max()) < 2e-2
    if exact or not shifted:
        assert float((difference < 1e-5).float().mean()) > (0.8 if exact else 0.1)
    codes, step = activations.quantize(x.to(DEVICE), layer.act_clip, 8, weight_bits, [
        (t.kind, [o.to(DEVICE) for o in t.operands()]) for t in chain
    ], number)  # fmt: skip
    for shift in shifts:
        x = shift(x)
    expected, scales = quantize_tokens(rotation(scale(x)), 8, clip, number)
    row = codes.cpu().transpose(1, 2).flatten(1)
    assert not row[:, width:].any()
    off = (row[:, :width].int() - expected.int()).abs()[keep]
    assert int(off.max()) <= 1 and float((off > 0).float().mean()) < (0.01 if exact else 0.04)
    torch.testing.assert_close(step.cpu()[keep], scales[keep, 0], rtol=1e-5 if exact else 1e-3, atol=0)


@pytest.mark.parametrize(
    "rotation, width, dtype",
    [
        (Hadamard(torch.ones(240, dtype=torch.int8), block=16), 240, torch.bfloat16),  # several blocks
        (Hadamard.random(2**13), 2**13, torch.float32),  # too long for three products for one
        (Hadamard.random(13824), 13824, torch.float16),  # 99 KB hold 128 x 128
    ],
)
def test_which_rotations_are_left_to_torch(rotation, width, dtype):
    steps = [(rotation.kind, rotation.operands())]
    assert KERNELS.fusable(steps, torch.empty(1, width, dtype=dtype)) == (1 if width == 13824 else 0)


def test_what_comes_out_of_torch_in_float32_is_asked_again():
    """A rotation that a kernel takes of bfloat16 rows, but not of the float32 ones that another transform makes."""
    width = 2048 + 512  # 40 x 64
    chain = [Hadamard(torch.ones(width, dtype=torch.int8), block=512), Hadamard.random(width)]
    step = ("hadamard", chain[1].operands())
    assert [
        KERNELS.fusable([step], torch.empty(1, width, dtype=t)) for t in (torch.bfloat16, torch.float32)
    ] == [1, 0]
    layer = make(20, width, 4, 8, chain=chain)
    torch.testing.assert_close(*compare(layer, torch.randn(3, width, generator=generator(1)).bfloat16()))


def test_a_dense_matrix_stays_in_torch():
    scale = ChannelScale(torch.rand(72, generator=generator(3)) + 0.5)
    x = torch.randn(9, 72, generator=generator(4))
    dense = Dense(torch.linalg.qr(torch.randn(72, 72, generator=generator(5)))[0])
    assert_same(*compare(make(20, 72, 4, 6, chain=[dense, scale]), x))
    torch.testing.assert_close(
        *compare(make(20, 72, 8, 8, chain=[scale, dense]), x.bfloat16()), rtol=0.02, atol=0.02
    )


@given(
    seeds, bits, st.integers(1, 40), st.sampled_from([None, 3, 24]), st.booleans(), st.sampled_from(DTYPES)
)
@settings(deadline=None, max_examples=15)
def test_weights_alone(seed, weight_bits, out_features, group_size, bias, dtype):
    layer = make(out_features, 72, weight_bits, None, seed=seed, group_size=group_size, bias=bias).to(dtype)
    x = torch.randn(5, 72, generator=generator(seed)).to(dtype)
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(*compare(layer, x), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_weights_are_those_of_the_reference(weight_bits, dtype):
    """A row of the unit matrix picks one weight, which no order of sums can change."""
    layer = make(33, 72, weight_bits, None, group_size=24, bias=False).to(dtype)
    y, expected = compare(layer, torch.eye(72).to(dtype))
    assert torch.equal(y, expected) and torch.equal(y.T, layer.weight.cpu())


@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_codes_of_activations_lie_in_planes(weight_bits):
    x = torch.randn(5, 203, generator=generator(weight_bits))
    codes, step = activations.quantize(x.to(DEVICE), None, 6, weight_bits)
    count, length = planes(weight_bits), padded_columns(203, weight_bits)
    assert codes.shape == (5, count, length)
    row = codes.cpu().transpose(1, 2).flatten(1)  # column by column again
    expected, scale = quantize_tokens(x, 6)
    assert torch.equal(row[:, :203], expected) and not row[:, 203:].any()
    assert torch.equal(step.cpu(), scale[:, 0])


@given(
    seeds,
    st.integers(1, 40),
    st.integers(1, 90),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.sampled_from(CLIPS),
)
@settings(deadline=None, max_examples=4 if interpreting() else 15)  # float8 is slow in the interpreter
def test_float8_products(seed, rows, out_features, in_features, dtype, clip):
    """Codes are those of the reference; sums in float32 may be in another order."""
    scale = ChannelScale(torch.rand(in_features, generator=generator(seed)) + 0.5)
    layer = make_float8(out_features, in_features, seed=seed, clip=clip, chain=[scale]).to(dtype)
    x = torch.randn(rows, in_features, generator=generator(seed)).to(dtype)
    y, expected = compare(layer, x)
    size = expected.abs().max().item()
    rounding = {torch.float32: FLOAT8_SUM, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y, expected, rtol=rounding, atol=rounding * size)


@pytest.mark.parametrize("clip", CLIPS)
def test_float8_codes_of_rows(clip):
    x = torch.randn(9, 203, generator=generator(1)) * torch.logspace(-9, 9, 9)[:, None]
    x[1], x[2, 7], x[3, 5] = 0, float("nan"), float("inf")
    x[4, :20] = torch.linspace(0, 1, 20) * x[4].abs().max() / 448 / 64  # the smallest numbers, and below them
    clip = None if clip is None else torch.tensor(clip, device=DEVICE)
    codes, step = activations.quantize(x.to(DEVICE), clip, 8, 8, number="fp8")
    expected, scale = quantize_tokens(x, 8, None if clip is None else clip.cpu(), "fp8")
    finite = [0, 1, 4, 5, 6, 7, 8]
    numbers = codes.cpu()[finite, 0, :203].view(torch.float8_e4m3fn).float()  # zero may have either sign
    assert torch.equal(numbers, decode(expected[finite], "fp8", 8)) and not codes[:, :, 203:].any()
    assert torch.equal(step.cpu()[finite], scale[finite, 0])
    y, expected = compare(make_float8(24, 203, clip=None if clip is None else clip.cpu()), x)
    assert torch.equal(y.isfinite(), expected.isfinite())


@pytest.mark.parametrize("width", [192, 512])
def test_float8_codes_of_rotated_rows(width):
    rotation = Hadamard.random(width, generator(width))
    layer = make_float8(40, width, chain=[rotation])
    x = torch.randn(21, width, generator=generator(3))
    y, expected = compare(layer, x)
    difference = (y - expected).abs().amax(1) / expected.abs().amax(1)
    assert float(difference.max()) < 5e-2 and float((difference < FLOAT8_SUM).float().mean()) > 0.5


@pytest.mark.parametrize(
    "config", [pytest.param(products.INTEGER[0], marks=pytest.mark.slow), products.INTEGER[-1]]
)
def test_float8_in_every_kind_of_tile(config, monkeypatch):
    monkeypatch.setattr(products, "choose", lambda problem, candidates, run, device: config)
    for width in (512, 277):
        layer = make_float8(config.outputs + 5, width)
        y, expected = compare(layer, torch.randn(config.rows + 3, width, generator=generator(7)))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=FLOAT8_SUM * expected.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_weights_are_those_of_the_reference(dtype):
    layer = make_float8(33, 72, acts=False, bias=False).to(dtype)
    y, expected = compare(layer, torch.eye(72).to(dtype))
    assert torch.equal(y, expected) and torch.equal(y.T, layer.weight.cpu())


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_computed_before_the_rounding(approximate):
    layer = make(70, 72, 4, 8).to(DEVICE)
    layer.weight_scale.mul_(20)
    x = torch.randn(37, 72, generator=generator(1)).to(DEVICE)
    for dtype in DTYPES:
        close_to_gelu(layer.to(dtype), x.to(dtype), approximate, "triton")
    alone = make(70, 72, 4, None, group_size=12).to(DEVICE)
    with torch.no_grad(), use_backend("triton"):
        assert torch.equal(alone(x, gelu=approximate), F.gelu(alone(x), approximate=approximate))


def test_views_and_empty_batches():
    layer = make(24, 48, 4, 8)
    x = torch.randn(48, 6, 5, generator=generator(1))
    for view in (x.permute(2, 1, 0), x[:, ::2, :3].permute(1, 2, 0), x.permute(1, 2, 0)[:0]):
        assert_same(*compare(layer, view))
    assert_same(*compare(layer, torch.randn(7, 96, generator=generator(2))[:, :48]))  # rows apart
    assert_same(*compare(layer, torch.randn(7, 96, generator=generator(2))[:, ::2]))
    assert compare(layer, torch.zeros(3, 0, 48))[0].shape == (3, 0, 24)
    assert compare(layer, x[:, 0, 0])[0].shape == (24,)
    weights = make(24, 48, 4, None, group_size=16)
    torch.testing.assert_close(*compare(weights, x.permute(2, 1, 0)), rtol=1e-5, atol=1e-5)
    assert compare(weights, torch.zeros(3, 0, 48))[0].shape == (3, 0, 24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_bits, group_size", [(8, None), (None, 16)])
def test_a_branch(dtype, act_bits, group_size):
    plain = make(24, 48, 4, act_bits, group_size=group_size)
    branch = torch.randn(3, 48, generator=generator(1)), torch.randn(24, 3, generator=generator(2))
    layer = PackedLinear.from_codes(
        plain.unpacked(), plain.weight_scale, 4, plain.bias, act_bits, group_size=group_size, branch=branch
    ).to(dtype)
    x = torch.randn(2, 20, 48, generator=generator(3)).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*compare(layer, x), rtol=3 * eps, atol=20 * eps)  # rounded twice
    with torch.no_grad(), use_backend("triton"):
        y, before = (layer(x.to(DEVICE), gelu=gelu).cpu() for gelu in ("tanh", None))
    torch.testing.assert_close(y, F.gelu(before, approximate="tanh"), rtol=3 * eps, atol=20 * eps)


def test_inputs_that_do_not_fit():
    layer = make(24, 96, 4, 8).to(DEVICE)
    arguments = (layer.codes, layer.weight_scale, None, None, 4, 8, [], [])
    with use_backend("triton"), pytest.raises(AttarError, match="does not fit"):
        torch.ops.attar.packed_linear(torch.zeros(2, 90, device=DEVICE), *arguments)
    with use_backend("triton"), pytest.raises(AttarError, match="the triton kernels take no"):
        layer(torch.zeros(2, 96, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("act_bits, group_size", [(6, None), (None, 16)])
def test_the_operator_obeys_the_rules_of_torch(act_bits, group_size):
    chain = [ChannelScale(torch.ones(32) * 2)] if act_bits else []
    layer = make(24, 32, 4, act_bits, chain=chain, group_size=group_size).to(DEVICE)
    operands = [tensor for transform in layer.transforms for tensor in transform.operands()]
    with use_backend("triton"):
        torch.library.opcheck(
            torch.ops.attar.packed_linear.default,
            (
                *(torch.randn(2, 5, 32, device=DEVICE), layer.codes, layer.weight_scale, layer.bias.detach()),
                *(None, 4, act_bits, [transform.kind for transform in chain], operands),
            ),
        )


@pytest.mark.slow
def test_a_block_compiles_without_graph_break():
    """aot_eager: the operator as a whole is one node of the graph, whatever runs below it."""
    block, call = wan_block()
    rotary = tuple(part.to(DEVICE) for part in call[3])
    block, call = block.to(DEVICE), (*(x.to(DEVICE) for x in call[:3]), rotary)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), use_backend("triton"):
        torch.testing.assert_close(compiled(*call), block(*call), rtol=1e-3, atol=1e-2)


def test_gradients_reach_what_lies_before_the_layer():
    for layer in (make(24, 32, 8, 8), make(24, 32, 8, None, group_size=8)):
        x = torch.randn(4, 32, device=DEVICE, requires_grad=True)
        with use_backend("triton"):
            layer.to(DEVICE)(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, -1))


def test_codes_stay_packed():
    layer = make(16, 64, 4, 8).to(DEVICE)
    compare(layer, torch.randn(3, 64))
    assert layer.codes.shape == (16, 32) and torch.equal(layer.codes, pack(layer.unpacked(), 4))


def test_which_backend_runs():
    with use_backend("triton"):
        assert backend_name(DEVICE) == "triton" and backend_description(DEVICE).startswith("triton: ")
        with pytest.raises(AttarError, match="does not run on meta"):
            backend_name("meta")
    assert backend_name("cpu") in ("cpu", "reference")  # the interpreter is never chosen by itself
    if not interpreting():
        assert backend_name("cuda") == "triton"


@pytest.fixture
def many_rows(monkeypatch):
    """Every number of rows is large, and tiles are small."""
    monkeypatch.setattr(products, "MANY_ROWS", 1)
    monkeypatch.setattr(products, "DENSE", (products.Config(32, 64, 64, 4, 2),))
    assert products.unpacks_first(1, "int", torch.device(DEVICE))


@pytest.mark.parametrize(
    "weight_bits", [3, 4, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 5, 6, 7, 8))]
)
def test_many_rows_give_the_same_integers(weight_bits, many_rows):
    chain = [ChannelScale(torch.rand(277, generator=generator(1)) + 0.5)]
    for in_features, clip, dtype in ((277, None, torch.float32), (256, (0.9, 0.95), DTYPES[weight_bits % 3])):
        layer = make(
            65, in_features, weight_bits, 8, seed=weight_bits, clip=clip, chain=chain * (clip is None)
        )
        x = torch.randn(35, in_features, generator=generator(7)).to(dtype)
        assert_same(*compare(layer.to(dtype), x))


@pytest.mark.parametrize(
    "config",
    [products.DENSE[0], *(pytest.param(c, marks=pytest.mark.slow) for c in products.DENSE[3::3])],
)
def test_every_tile_of_many_rows_gives_the_same_integers(config, many_rows, monkeypatch):
    """Several tiles each way, of which the last are ragged, for programs that take more than one."""
    monkeypatch.setattr(products, "choose", lambda problem, candidates, run, device: config)
    layer = make(
        config.outputs + 5, 277, 4, 8, bias=config.group > 4
    ).bfloat16()  # float32 fits not all of them
    assert_same(*compare(layer, torch.randn(config.rows + 3, 277, generator=generator(7)).bfloat16()))


@pytest.mark.slow
@pytest.mark.parametrize("approximate", [pytest.param("none", marks=pytest.mark.slow), "tanh"])
def test_gelu_of_many_rows(approximate, many_rows):
    layer = make(70, 72, 4, 8).to(DEVICE)
    layer.weight_scale.mul_(20)
    for dtype in DTYPES:
        x = torch.randn(37, 72, generator=generator(1)).to(DEVICE, dtype)
        close_to_gelu(layer.to(dtype), x, approximate, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_weights_for_many_rows_are_those_of_the_reference(weight_bits, dtype, many_rows):
    layer = make(33, 72, weight_bits, None, group_size=24, bias=False).to(dtype)
    y, expected = compare(layer, torch.eye(72).to(dtype))
    assert torch.equal(y, expected) and torch.equal(y.T, layer.weight.cpu())
    layer = make_float8(33, 72, acts=False, bias=False).to(dtype)
    assert_same(*compare(layer, torch.eye(72).to(dtype)))


@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_unpacked_codes(weight_bits):
    layer = make(33, 203, weight_bits, 8)
    found = products.unpacked(layer.codes.to(DEVICE), None, 203, weight_bits, torch.int8)
    assert torch.equal(found.cpu(), layer.unpacked()) and found.stride() == (256, 1)


def test_step_sizes_do_not_depend_on_the_device():
    """CUDA multiplies by the reciprocal where a tensor is divided by a number."""
    x = torch.randn(2000, 64, generator=generator(1))
    here, there = quantize_tokens(x, 8, (0.95, 0.95)), quantize_tokens(x.to(DEVICE), 8, (0.95, 0.95))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
