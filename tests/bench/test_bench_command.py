"""`attar bench` on real classes: the blocks that it measures, and what it says of them."""

import json

import pytest
import torch

from attar.bench.command import bench
from attar.bench.run import bench_block, without_transforms
from attar.bench.subject import bench_blocks, latent_grid, pack_block
from attar.errors import AttarError
from attar.forecast.architecture import find_architecture
from attar.models.block import BlockCall
from attar.recipe import load_recipe
from attar.runtime.layers import packed_layers

ROTATED = load_recipe("hadamard", {"quantize.weights": 8, "quantize.acts": 8})


@pytest.mark.parametrize("shape", ["wan-1.3b", "wan-14b", "hunyuan", "cogvideox-5b", "ltx-2b", "flux"])
@pytest.mark.parametrize("tokens", [64, 96, 2048])
def test_the_grid_has_the_tokens_that_were_asked_for(shape, tokens):
    architecture = find_architecture(shape)
    grid = latent_grid(architecture, tokens)
    config = next(iter(architecture.transformers.values())).config
    size = config.get("patch_size", 1) if shape != "flux" else 2
    patch = size if isinstance(size, (tuple, list)) else (config.get("patch_size_t") or 1, size, size)
    assert grid.frames * grid.height * grid.width == tokens * patch[0] * patch[1] * patch[2]


def test_packed_blocks_compute_nearly_what_dense_ones_do():
    architecture = find_architecture("digits-video")
    (block,) = bench_blocks(architecture, latent_grid(architecture, 64), 16, torch.float32)
    assert (block.kind, block.count) == ("WanTransformerBlock", 8)
    assert isinstance(block.call, BlockCall)
    module = pack_block(block, ROTATED)
    dense, packed = (block.run(m)["hidden_states"] for m in (block.dense, module))
    assert dense.shape == (1, 64, 256)
    update = dense - block.call.streams["hidden_states"]
    assert 0 < (packed - dense).norm() < 0.05 * update.norm()
    assert set(packed_layers(module)) == set(block.roles)


def test_what_is_learned_is_left_out():
    architecture = find_architecture("digits-video")
    (block,) = bench_blocks(architecture, latent_grid(architecture, 64), 16, torch.float32)
    recipe = load_recipe("attar", {"allocate": None, "quantize.shift": False, "rounding.epochs": 2})
    assert set(packed_layers(pack_block(block, recipe))) == set(block.roles)


def test_parts_are_named_and_memory_is_that_of_the_linears(small_limit):
    result = bench("digits-video", ROTATED, tokens=64, rounds=3, dtype=torch.float32)
    (block,) = result["blocks"]
    names = [row["part"] for row in block["parts"]]
    assert {"self_attn.q", "cross_attn.k", "ffn.down", "self attention", "norms", "rest"} <= set(names)
    assert min(row["seconds"][name] for row in block["parts"] for name in ("dense", "packed")) > 0
    weights = 8 * (8 * 256 * 256 + 2 * 256 * 1024)
    biases = 8 * (8 * 256 + 1024 + 256)
    assert result["weight_bytes"]["dense"] == 4 * (weights + biases)
    assert 0.25 < result["weight_bytes"]["share"] < 0.27
    json.dumps(result)


def test_transforms_are_what_linears_take_less_without_them():
    architecture = find_architecture("digits-video")
    (block,) = bench_blocks(architecture, latent_grid(architecture, 64), 16, torch.float32)
    dense = load_recipe("hadamard", {"quantize.rotation": "orthogonal"})  # a matrix as large as the weight
    for recipe, least in ((dense, 0.1), (load_recipe("rtn"), 0.0)):
        module = pack_block(block, recipe)
        before = block.run(module)["hidden_states"]
        with without_transforms(module):
            plain = block.run(module)["hidden_states"]
        assert torch.equal(block.run(module)["hidden_states"], before)
        assert torch.equal(plain, before) == (least == 0)
        found = bench_block(block, module, 3)
        share = found["transforms"]["seconds"]["packed"] / found["linears"]["seconds"]["packed"]
        assert least <= share < 1


@pytest.mark.slow
def test_models_with_two_kinds_of_blocks_are_measured_by_kind():
    architecture = find_architecture("flux")
    transformer = next(iter(architecture.transformers.values()))
    small = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    with torch.device("meta"):
        architecture.transformers["transformer"] = type(transformer).from_config({**config, **small})
    blocks = bench_blocks(architecture, latent_grid(architecture, 16), 8, torch.float32)
    assert [(b.kind, b.count) for b in blocks] == [
        ("FluxTransformerBlock", 19),
        ("FluxSingleTransformerBlock", 38),
    ]
    for block in blocks:
        assert set(block.run(pack_block(block, ROTATED))) == set(block.run(block.dense))


def test_no_tokens_are_refused():
    with pytest.raises(AttarError, match="0 tokens"):
        bench("digits-video", ROTATED, tokens=0)
