"""What only a GPU can show of the Triton kernels: graphs, compiled blocks, measured choices."""

from __future__ import annotations

import json

import pytest
import torch
from support.layers import both, make, make_float8, wan_block

from attar.runtime import backend_name, use_backend
from attar.runtime.transforms import ChannelScale, Hadamard, Kronecker

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, as on the first day."""
    from attar.runtime.triton import tune

    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_tuners", {})
    return tmp_path


def on_gpu(value):
    return tuple(on_gpu(v) for v in value) if isinstance(value, tuple) else value.cuda()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_a_block_compiles_whole(mode):
    block, call = wan_block()
    block, call = block.cuda(), on_gpu(call)
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(*call), block(*call), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("tuned", [True, False])
def test_a_graph_gives_what_the_calls_give(tuned, cache):
    """Also where nothing ran before the capture but the compilation of kernels: then the default tile is used."""
    layers = [make(96, 64, 4, 8), make(96, 64, 8, 8), make(96, 64, 4, None, group_size=16)]
    layers = [layer.to("cuda", torch.bfloat16) for layer in layers]
    x = torch.randn(50, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if not tuned:
            patch.setenv("ATTAR_TRITON_TUNING", "0")
        expected = [layer(x) for layer in layers]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [layer(x) for layer in layers]
        for seed in range(2):
            x.copy_(torch.randn(50, 64, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            expected = [layer(x) for layer in layers]
            assert all(torch.equal(y, e) for y, e in zip(outputs, expected, strict=True))
    assert bool(list(cache.glob("triton-*.json"))) == tuned


def test_a_call_never_waits_for_the_device():
    layer = make(96, 64, 4, 8, chain=[ChannelScale(torch.rand(64) + 0.5)], clip=(0.9, 0.9)).cuda()
    x = torch.randn(50, 64, device="cuda")
    with torch.no_grad():
        layer(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_choices_are_measured_and_kept(cache):
    assert backend_name("cuda") == "triton"
    layer = make(1024, 512, 4, 8).cuda()
    both(layer, torch.randn(2048, 512, device="cuda"), "triton")
    (path,) = cache.glob("triton-*.json")
    content = json.loads(path.read_text())
    assert content["device"] == torch.cuda.get_device_name() and len(content["choices"]) == 1


def test_real_sizes_give_the_integers_of_the_reference():
    for weight_bits in (4, 8):
        layer = make(1536, 8960, weight_bits, 8, bias=True, clip=(0.95, 0.95)).to("cuda", torch.bfloat16)
        y, expected = both(layer, torch.randn(2000, 8960, device="cuda").bfloat16(), "triton")
        assert torch.equal(y, expected)


@pytest.mark.parametrize("transform", [None, "hadamard", "kronecker"])
@pytest.mark.parametrize("weight_bits, dtype", [(4, torch.bfloat16), (3, torch.float16), (8, torch.float32)])
def test_many_rows_of_real_layers(weight_bits, dtype, transform):
    """Thousands of rows, ragged ones, and a width whose rotation fills a program's shared memory."""
    chain = {
        None: [],
        "hadamard": [Hadamard.random(13824)],
        "kronecker": [Kronecker(*(torch.linalg.qr(torch.randn(n, n))[0] for n in (108, 128)))],
    }[transform]
    layer = make(1000, 13824, weight_bits, 8, bias=True, chain=chain).to("cuda", dtype)
    y, expected = both(layer, torch.randn(3001, 13824, device="cuda").to(dtype), "triton")
    if transform is None:
        assert torch.equal(y, expected)
    else:
        assert (y - expected).float().norm() < 5e-3 * expected.float().norm()


def test_float8_of_many_rows():
    layer = make_float8(1024, 1536).to("cuda", torch.bfloat16)
    y, expected = both(layer, torch.randn(3001, 1536, device="cuda").bfloat16(), "triton")
    assert (y - expected).float().norm() < 3e-3 * expected.float().norm()


def test_weights_alone_meet_many_rows():
    layer = make(1024, 1536, 4, None, group_size=128).to("cuda", torch.bfloat16)
    y, expected = both(layer, torch.randn(3001, 1536, device="cuda").bfloat16(), "triton")
    assert torch.equal(y, expected)


def test_weights_in_memory_stay_packed():
    layer = make(4096, 4096, 4, 8).to("cuda", torch.bfloat16)
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), use_backend("triton"):
        layer(x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(x)
    assert torch.cuda.max_memory_allocated() - before < 4096 * 4096 // 4
