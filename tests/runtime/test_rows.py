"""Rows of several kinds: storage, values, loading, refusals."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import AttarError
from attar.runtime import PackedLinear, use_backend
from attar.runtime.backend import backend_name
from attar.runtime.formats import code_range
from attar.runtime.packing import unpack
from attar.runtime.rows import RowKind, kinds_of, pack_rows, split_rows
from attar.runtime.transforms import ChannelScale

KINDS = [RowKind(3, "int", 3), RowKind(4, "int", 8), RowKind(5, "int", 5)]
WITH_TABLE = [RowKind(3, "int", 3), RowKind(4, "int", 8), RowKind(5, "table", 5)]
OUT = 16


def shuffled(kinds, seed=0):
    rows = torch.cat([torch.full((k.count,), i, dtype=torch.uint8) for i, k in enumerate(kinds)])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def parts(kinds, width=40, seed=0):
    """Codes, kinds of rows, scales, levels."""
    g = torch.Generator().manual_seed(seed)
    row_kind = shuffled(kinds, seed)
    codes = torch.zeros(len(row_kind), width, dtype=torch.int8)
    levels = []
    for i, kind in enumerate(kinds):
        low, high = code_range(kind.bits)
        codes[row_kind == i] = torch.randint(low, high + 1, (kind.count, width), generator=g).to(torch.int8)
        if kind.number == "table":
            found = torch.rand(kind.count, 1 << kind.bits, generator=g) * 2 - 1
            levels.append(found.sort(-1).values.half().flatten())
    scale = torch.rand(len(row_kind), 1, generator=g) + 0.01
    return codes, row_kind, scale, torch.cat(levels) if levels else None


def layer_of(kinds, width=40, act_bits=6, dtype=torch.float32, seed=0):
    codes, row_kind, scale, levels = parts(kinds, width, seed)
    g = torch.Generator().manual_seed(seed + 1)
    transforms = [ChannelScale(torch.rand(width, generator=g) + 0.5)]
    return PackedLinear.from_codes(
        codes, scale, max(k.bits for k in kinds), torch.randn(len(row_kind), generator=g).to(dtype), act_bits,
        None, transforms, compute_dtype=dtype, levels=levels, rows=kinds, row_kind=row_kind,
    )  # fmt: skip


def alone(layer, row):
    """The row as a layer of its own, of one kind."""
    own = next(r for r in layer._kinds() if row in r.places.tolist())
    at = own.places.tolist().index(row)
    codes = unpack(own.codes, own.kind.bits, layer.in_features)[at : at + 1]
    return PackedLinear.from_codes(
        codes, layer.weight_scale[row : row + 1], own.kind.bits, layer.bias[row : row + 1], layer.act_bits, None,
        list(layer.transforms), compute_dtype=layer.compute_dtype, weight_format=own.kind.number,
        levels=None if own.levels is None else own.levels[at : at + 1],
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    bits=st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True),
    counts=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    width=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_packing_rows_round_trips(bits, counts, width, seed):
    kinds = [RowKind(b, "table" if b == 1 else "int", n) for b, n in zip(bits, counts, strict=False)]
    codes, row_kind, _, levels = parts(kinds, width, seed)
    packed = pack_rows(codes, row_kind, kinds)
    assert packed.numel() == sum(k.count * -(-width * k.bits // 8) for k in kinds)
    back = torch.empty_like(codes)
    for own in split_rows(packed, row_kind, kinds, width, levels):
        assert torch.equal(row_kind[own.places], row_kind.new_full((own.kind.count,), kinds.index(own.kind)))
        back[own.places] = unpack(own.codes, own.kind.bits, width)
    assert torch.equal(back, codes)


@pytest.mark.parametrize("kinds", [KINDS, WITH_TABLE], ids=["integers", "a table"])
@pytest.mark.parametrize("act_bits", [6, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_is_what_it_is_alone(kinds, act_bits, dtype):
    layer = layer_of(kinds, act_bits=act_bits, dtype=dtype)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    # floating-point sums depend on the shape of the product, integers do not
    near = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {}
    with use_backend("reference"):
        y = layer(x)
        for row in range(OUT):
            own = alone(layer, row)(x)
            exact = act_bits is not None and alone(layer, row).weight_format == "int"
            torch.testing.assert_close(
                y[..., row : row + 1], own, **({"rtol": 0, "atol": 0} if exact else near)
            )
            assert torch.equal(layer.weight[row], alone(layer, row).weight[0])
    assert y.dtype == dtype and y.shape == (2, 3, OUT)


@pytest.mark.parametrize("act_bits", [8, 4, None])
@pytest.mark.parametrize("gelu", [None, "tanh"])
def test_kernels_give_the_references_integers(act_bits, gelu):
    if backend_name("cpu") != "cpu":
        pytest.skip("no compiled kernels here")
    layer = layer_of(KINDS, 72, act_bits)
    x = torch.randn(9, 72)
    with use_backend("reference"):
        expected = layer(x, gelu=gelu)
    with use_backend("cpu"):
        torch.testing.assert_close(layer(x, gelu=gelu), expected, rtol=1e-5, atol=1e-5)
    with use_backend("cpu"), pytest.raises(AttarError, match="take no table"):
        layer_of(WITH_TABLE)(torch.randn(2, 40))


def test_gradient_is_that_of_the_weight():
    layer = layer_of(KINDS)
    x = torch.randn(3, 40, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kinds", [KINDS, WITH_TABLE], ids=["integers", "a table"])
def test_scheme_and_state_make_the_same_layer(kinds):
    layer = layer_of(kinds)
    scheme = json.loads(json.dumps(layer.scheme()))
    assert scheme["rows"] == [[k.bits, k.number, k.count] for k in kinds] and "levels" not in scheme
    again = PackedLinear.from_scheme(scheme, 40, OUT, True, device="cpu")
    again.load_state_dict(layer.state_dict())
    again.settle("layer")
    x = torch.randn(4, 40)
    assert torch.equal(again(x), layer(x))
    assert layer.bfloat16().row_kind.dtype == torch.uint8


def test_one_operator_for_each_kind_and_no_graph_break():
    layer = layer_of(KINDS)
    x = torch.randn(5, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_refusals():
    codes, row_kind, scale, levels = parts(KINDS)
    make = lambda **k: PackedLinear.from_codes(  # noqa: E731
        codes, scale, k.pop("bits", 5), rows=k.pop("rows", KINDS), row_kind=k.pop("row_kind", row_kind), **k
    )
    for changed, words in (
        ({"row_kind": None}, "all rows"),
        ({"row_kind": row_kind.flip(0).clone().fill_(1)}, "do not fit"),
        ({"rows": KINDS[:2]}, "are not 16 rows"),
        ({"bits": 8}, "widest rows have 5 bits"),
        ({"weight_format": "fp8", "bits": 5}, "8 bits"),
        ({"group_size": 20}, "formats of their own"),
    ):
        with pytest.raises(AttarError, match=words):
            make(**changed)
    for listed in ([], [[3, "int"]], [[0, "int", 3]], [[9, "int", 3]], [[4, "fp8", 3]], [[1, "int", 3]], [3]):
        with pytest.raises(AttarError):
            kinds_of(listed)
    with pytest.raises(AttarError, match="sorted"):
        codes, row_kind, scale, levels = parts(WITH_TABLE)
        PackedLinear.from_codes(codes, scale, 5, levels=levels.flip(0), rows=WITH_TABLE, row_kind=row_kind)
    layer = layer_of(KINDS)
    layer.row_kind.zero_()
    with pytest.raises(AttarError, match="do not fit"):
        layer.settle("there")
