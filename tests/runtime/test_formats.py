"""Number formats of the runtime: codes, their numbers, and packed layers that have them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import AttarError
from attar.quantize.tables import TABLES, fit_levels
from attar.runtime import PackedLinear, use_backend
from attar.runtime.checkpoint import check_config, quantization_config_of
from attar.runtime.formats import FP8_LARGEST, decode, encode, largest
from attar.runtime.packing import pack, unpack
from attar.runtime.reference import quantize_tokens, symmetric_scale

OUT, IN = 12, 32


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(number, bits, act_bits=None, act_format="int", branch=None, bias=None, weight=None, levels=None):
    weight = random(OUT, IN) if weight is None else weight
    scale = symmetric_scale(weight.abs().amax(1, keepdim=True), bits, number)
    codes = encode((weight / scale)[:, None], number, bits, levels)[:, 0]
    return PackedLinear.from_codes(
        codes,
        scale,
        bits,
        bias,
        act_bits,
        weight_format=number,
        act_format=act_format,
        levels=levels,
        branch=branch,
    )


def test_every_float8_number_is_its_own_code():
    patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values = patterns.view(torch.float8_e4m3fn).float()
    finite = torch.isfinite(values)
    codes = encode(values[finite], "fp8", 8)
    assert torch.equal(decode(codes, "fp8", 8), values[finite])
    assert finite.sum() == 254 and values[finite].max() == FP8_LARGEST == largest("fp8", 8)
    # what lies in memory is the bit pattern, which tensor cores read
    assert torch.equal(pack(codes[None], 8)[0], patterns[finite])
    assert torch.equal(unpack(pack(codes[None], 8), 8, 254)[0], codes)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 9999), st.sampled_from([(1, 1), (5, 1), (5, 3)]))
def test_a_table_rounds_to_its_nearest_number(bits, seed, shape):
    levels = random(*shape, 1 << bits, seed=seed).clamp(-1, 1).sort(-1).values.half()
    steps = random(5, 3, 7, seed=seed + 1)
    got = decode(encode(steps, "table", bits, levels), "table", bits, levels)
    distances = (steps[..., None] - levels.float().expand(5, 3, -1)[..., None, :]).abs()
    assert torch.equal((steps - got).abs(), distances.amin(-1))


def test_numbers_outside_the_range_saturate_and_nan_stays():
    steps = torch.tensor([1e9, -1e9, 0.0, -0.0, float("nan")])
    assert decode(encode(steps, "fp8", 8), "fp8", 8)[:4].tolist() == [448, -448, 0, 0]
    assert decode(encode(steps, "fp8", 8), "fp8", 8)[4].isnan()
    assert decode(encode(steps[:2], "int", 4), "int", 4).tolist() == [7, -8]


def test_a_float8_layer_is_the_product_of_its_rounded_factors():
    layer, x = layer_of("fp8", 8, 8, "fp8", bias=random(OUT, seed=3)), random(2, 5, IN, seed=4)
    # rounding to a mantissa of three bits errs by a sixteenth at most
    assert ((layer.dequantized() - random(OUT, IN)).abs() <= random(OUT, IN).abs() / 16 + 1e-4).all()
    for dtype, tight in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        layer, x = layer.to(dtype), x.to(dtype)
        codes, step = quantize_tokens(x, 8, None, "fp8")
        rounded = decode(codes, "fp8", 8).double() * step.double()
        expected = rounded @ layer.dequantized().double().T + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=tight, atol=tight)


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("name", [name for name, table in TABLES.items() if 4 in table.bits])
def test_a_table_layer(name, act_bits):
    weight = random(OUT, IN)
    steps = (weight / weight.abs().amax(1, keepdim=True))[:, None]
    layer, x = layer_of("table", 4, act_bits, levels=fit_levels(name, steps, 4)), random(3, IN, seed=2)
    torch.testing.assert_close(
        layer(x), F.linear(x, layer.weight), rtol=0.05, atol=0.15 if act_bits else 1e-4
    )
    assert (layer.weight - weight).square().mean() < 0.02
    assert layer.levels.dtype == torch.float16 and layer.bfloat16().levels.dtype == torch.float16


def test_a_branch_is_added_in_full_and_belongs_to_the_weight():
    branch = (random(2, IN, seed=5), random(OUT, 2, seed=6))
    plain, layer, x = layer_of("int", 8, 8), layer_of("int", 8, 8, branch=branch), random(4, IN, seed=7)
    expected = plain(x) + F.linear(F.linear(x, branch[0]), branch[1])
    assert torch.equal(layer(x), expected)
    torch.testing.assert_close(layer.weight, plain.weight + branch[1] @ branch[0])
    x.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, -1))
    assert layer.bfloat16().low_rank_in.dtype == torch.bfloat16
    with pytest.raises(AttarError, match="low_rank_out has shape"):
        layer_of("int", 8, 8, branch=(branch[0], branch[1][:, :1]))


def test_a_scheme_says_only_what_the_layer_has():
    model = torch.nn.ModuleDict({"a": layer_of("int", 8, 8)})
    assert quantization_config_of(model)["format_version"] == 1
    levels = fit_levels("nf4", random(1, 1, 8), 4)
    model["b"] = layer_of("table", 4, levels=levels, branch=(random(2, IN), random(OUT, 2)))
    config = quantization_config_of(model)
    assert config["format_version"] == 2 and check_config(config) == config
    assert (
        config["schemes"][1] | {"weight_format": "table", "levels": "layer", "low_rank": 2}
        == config["schemes"][1]
    )
    empty = PackedLinear.from_scheme(config["schemes"][1], IN, OUT, False)
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model["b"].state_dict().items()
    }
    config["format_version"] = 1  # which had no such fields
    with pytest.raises(AttarError, match="scheme 1 is not one"):
        check_config(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"number": "fp8", "bits": 4}, "fp8 has 8 bits"),
        ({"number": "table", "bits": 4}, "needs 16 levels"),
        ({"number": "int", "bits": 4, "act_format": "fp8"}, "needs activation quantization"),
        ({"number": "int", "bits": 4, "act_bits": 4, "act_format": "fp8"}, "fp8 has 8 bits"),
        ({"number": "int", "bits": 4, "act_bits": 4, "act_format": "table"}, "activations have no tables"),
        ({"number": "int", "bits": 4, "levels": torch.zeros(1, 1, 16)}, "cannot have levels"),
        ({"number": "log", "bits": 4}, "unknown number format"),
        ({"number": "table", "bits": 2, "levels": torch.tensor([[[0.5, -1, 0, 1]]])}, "sorted numbers"),
    ],
)
def test_what_does_not_go_together(arguments, message):
    with pytest.raises(AttarError, match=message):
        layer_of(**arguments)


def test_a_forced_backend_without_kernels_for_a_format_is_an_error():
    layer, x = layer_of("fp8", 8, 8, "fp8"), random(2, IN)
    with use_backend("reference"):
        expected = layer(x)
    assert torch.equal(layer(x), expected)
    with use_backend("cpu"), pytest.raises(AttarError, match="no fp8 weights with fp8 activations"):
        layer(x)


def test_one_bit_is_for_tables():
    levels = torch.tensor([-0.5, 0.5]).half().view(1, 1, 2)
    layer = layer_of("table", 1, levels=levels)
    assert layer.codes.shape == (OUT, IN // 8) and set(layer.dequantized().unique().abs().tolist())
    x, scale = random(3, IN), layer.weight_scale
    torch.testing.assert_close(layer(x), x @ (torch.where(layer.unpacked() < 0, -0.5, 0.5) * scale).T)
    for refused in (lambda: PackedLinear(8, 8, weight_bits=1), lambda: symmetric_scale(torch.ones(1), 1)):
        with pytest.raises(AttarError, match="cannot quantize to 1 bits"):
            refused()
    with pytest.raises(AttarError, match="cannot quantize to 1 bits"):
        PackedLinear(8, 8, weight_bits=4, act_bits=1)
