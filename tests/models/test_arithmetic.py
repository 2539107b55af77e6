"""Blocks that compute in bfloat16 while they are calibrated, and what does not."""

from types import SimpleNamespace

import pytest
import torch
from support import tiny
from torch import nn

from attar.calibration.catch import catch_block_calls
from attar.errors import AttarError
from attar.models.adapter import ModelAdapter
from attar.models.arithmetic import Arithmetic, default_precision
from attar.models.attention_mass import attention_mass, column_mass
from attar.models.block import run_block
from attar.quantize.initialize import collect_input_stats
from attar.quantize.linear import QuantizedLinear
from attar.quantize.rounding import collect_hessians
from attar.quantize.transforms import LearnedKronecker


def case(name):
    build, make_call = tiny.MODELS[name]
    model = build()
    adapter = ModelAdapter.of(model)
    block = adapter.blocks[0]
    (call,) = catch_block_calls(model, adapter, block.index, [make_call(model, batch=2)])
    return block, call


@pytest.mark.parametrize("name", tiny.MODELS)
@torch.no_grad()
def test_streams_are_float32_and_near(name):
    block, call = case(name)
    exact = run_block(block.module, call, block.outputs)
    same = Arithmetic("float32", "cpu").run(block.module, call, block.outputs)
    near = Arithmetic("bfloat16", "cpu").run(block.module, call, block.outputs)
    assert exact.keys() == same.keys() == near.keys()
    for key, stream in exact.items():
        assert torch.equal(stream, same[key])
        assert near[key].dtype == torch.float32
        error = (near[key] - stream).norm() / stream.norm()
        assert 0 < error < 0.02, f"{key}: {error}"


def test_what_a_model_is_held_in_decides():
    assert default_precision("cuda", True) == "bfloat16"
    assert {default_precision(*c) for c in (("cuda", False), ("cpu", True))} == {"float32"}
    model = nn.Linear(2, 2)
    assert Arithmetic.of(model).precision == "float32"
    assert Arithmetic.of(model.bfloat16()).precision == "float32"
    assert Arithmetic.of(model, "bfloat16").precision == "bfloat16"


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_parameters_that_stay_in_float32_do_not_decide(name, tmp_path, monkeypatch):
    tiny.MODELS[name][0]().save_pretrained(tmp_path)
    kind = type(tiny.MODELS[name][0]())
    for dtype, expected in ((torch.bfloat16, "bfloat16"), (torch.float16, "bfloat16"), (None, "float32")):
        model = kind.from_pretrained(tmp_path, torch_dtype=dtype)
        model.attar_weights = SimpleNamespace(device=torch.device("cuda:1"))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        assert Arithmetic.of(model).precision == expected


def test_a_gpu_has_to_compute_in_bfloat16(monkeypatch):
    model = nn.Linear(2, 2).half()
    model.attar_weights = SimpleNamespace(device=torch.device("cuda:0"))
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        assert Arithmetic.of(model).precision == ("bfloat16" if able else "float32")
        assert Arithmetic.of(model, "bfloat16").precision == "bfloat16"


def test_an_unknown_precision_is_an_error():
    with pytest.raises(AttarError, match="unknown precision 'bf16'"):
        Arithmetic("bf16", "cpu")


def test_a_function_that_computes_so():
    linear, x = nn.Linear(64, 8), torch.randn(3, 64)
    function = Arithmetic("bfloat16", "cpu").bound(linear)
    assert function(x).dtype == torch.float32 and function(input=x).shape == (3, 8)
    assert torch.equal(function(x), linear.bfloat16()(x.bfloat16()).float())
    assert not torch.is_autocast_enabled("cpu")


def quantized(width=64):
    torch.manual_seed(0)
    return QuantizedLinear(nn.Linear(width, 24), 4, 6, [LearnedKronecker(width)], shift=torch.randn(width))


@torch.no_grad()
def test_rounding_and_statistics_leave_it(monkeypatch):
    layer, x = quantized(), torch.randn(2, 50, 64)
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b: seen.append((x, w)) or linear(x, w, b))
    exact, near = layer(x), Arithmetic("bfloat16", "cpu").bound(layer)(x)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(*seen, strict=True))
    assert 0 < (near - exact).norm() < 0.01 * exact.norm()

    def both(measure):
        return [measure(run) for run in (layer, Arithmetic("bfloat16", "cpu").bound(layer))]

    for measure in (
        lambda run: collect_hessians(run, [x], {"a": layer})["a"],
        lambda run: collect_input_stats(run, [x], {"a": layer}, rotations={"a": layer.transforms[0]})["a"],
    ):
        full, other = both(measure)
        assert torch.equal(full, other)


def test_the_attention_that_tokens_receive_is_that_of_float32():
    build, make_call = tiny.MODELS["wan"]
    model = build()
    adapter = ModelAdapter.of(model)
    adapter.observe(make_call(model, batch=2))
    block = adapter.blocks[0]
    (call,) = catch_block_calls(model, adapter, block.index, [make_call(model, batch=2)])
    with torch.no_grad(), attention_mass(adapter, block) as mass:
        Arithmetic("bfloat16", "cpu").run(block.module, call, block.outputs)
    for found in mass.per_stream().values():
        heads = found.sum(1)  # every query of every head gives a mass of one
        assert torch.allclose(heads, heads.round(), atol=1e-4) and (heads.round() > 0).all()
    q = torch.randn(1, 2, 30, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert column_mass(q, q).dtype == torch.float32


def test_frozen_layers_round_alike():
    layer, x = quantized(), torch.randn(5, 64)
    layer.freeze()
    with torch.no_grad():
        exact, near = layer(x), Arithmetic("bfloat16", "cpu").bound(layer)(x)
        packed = layer.bake()
        assert torch.equal(Arithmetic("bfloat16", "cpu").bound(packed)(x), packed(x))
    assert 0 < (near - exact).norm() < 0.01 * exact.norm()
