"""The adapter on tiny random models of seven real diffusers classes."""

import pytest
import torch
from support import tiny
from torch import nn

from attar.calibration.catch import catch_block_calls
from attar.errors import AttarError
from attar.models.adapter import ModelAdapter
from attar.models.block import run_block

JOINT = {
    "cogvideox": ("encoder_hidden_states", "hidden_states"),
    "flux": ("encoder_hidden_states", "hidden_states"),
    "hunyuan": ("hidden_states", "encoder_hidden_states"),
}


@pytest.fixture(params=tiny.MODELS)
def case(request):
    build, call = tiny.MODELS[request.param]
    model = build()
    return request.param, model, call(model, batch=2)


def test_blocks_in_order_and_named(case):
    name, model, _ = case
    adapter = ModelAdapter.of(model)
    assert len(adapter.blocks) == (4 if name in ("hunyuan", "flux") else 3)
    assert [b.index for b in adapter.blocks] == list(range(len(adapter.blocks)))
    for block in adapter.blocks:
        assert model.get_submodule(block.name) is block.module


def test_every_linear_in_a_block_has_a_role(case):
    name, model, _ = case
    adapter = ModelAdapter.of(model)
    for block in adapter.blocks:
        linears = adapter.linears(block)
        inside = {n for n, m in block.module.named_modules() if isinstance(m, nn.Linear)}
        assert {line.name.removeprefix(f"{block.name}.") for line in linears} == inside
        assert all(line.role != "other" for line in linears)
        assert all(model.get_submodule(line.name) is line.module for line in linears)
        roles = {line.role for line in linears}
        assert {"ffn.up", "ffn.down"} <= roles
        kind = "joint_attn" if name in JOINT else "self_attn"
        assert {f"{kind}.q", f"{kind}.k", f"{kind}.v"} <= roles
        assert all(line.module.in_features >= 32 for line in linears)


def test_each_block_of_dit_has_the_embedding_of_time(case):
    name, model, _ = case
    adapter = ModelAdapter.of(model)
    found = [
        line
        for block in adapter.blocks
        for line in adapter.linears(block)
        if "timestep_embedder" in line.name
    ]
    assert [line.role for line in found] == ["time_conditioning"] * (6 if name == "dit" else 0)
    if name == "dit":
        roles = {line.name: line.role for line in adapter.linears(adapter.blocks[0])}
        assert roles["transformer_blocks.0.norm1.linear"] == "modulation"


def test_outside_linears_are_the_rest(case):
    name, model, _ = case
    adapter = ModelAdapter.of(model)
    outside = adapter.outside_linears()
    inside = [line for block in adapter.blocks for line in adapter.linears(block)]
    assert len(outside) + len(inside) == sum(isinstance(m, nn.Linear) for m in model.modules())
    assert all(line.role != "other" for line in outside)
    conditioning = set() if name == "dit" else {"time_conditioning", "text_conditioning"}  # in its blocks
    assert {"head", *conditioning} <= {line.role for line in outside}


def test_attention_kinds_and_joint_order(case):
    name, model, call = case
    adapter = ModelAdapter.of(model)
    adapter.observe(call)
    for block in adapter.blocks:
        kinds = [a.kind for a in adapter.attentions(block)]
        assert kinds == (["joint"] if name in JOINT else ["self"] if name == "dit" else ["self", "cross"])
        assert adapter.joint_order(block) == JOINT.get(name, ("hidden_states",))


def test_streams_of_flux_are_told_apart_though_text_comes_out_first():
    model = tiny.flux()
    adapter = ModelAdapter.of(model)
    adapter.observe(tiny.flux_call(model))
    assert {b.outputs for b in adapter.blocks} == {("encoder_hidden_states", "hidden_states")}
    model = tiny.hunyuan()
    adapter = ModelAdapter.of(model)
    adapter.observe(tiny.hunyuan_call(model))
    assert {b.outputs for b in adapter.blocks} == {("hidden_states", "encoder_hidden_states")}


@pytest.mark.parametrize("name", ["flux", "hunyuan", "cogvideox", "wan"])
def test_a_single_block_is_named_by_shape(name):
    build, make_call = tiny.MODELS[name]
    full, full_call = build(), None
    full_call = make_call(full)
    reference = ModelAdapter.of(full)
    reference.observe(full_call)
    single = build(num_layers=1, **({"num_single_layers": 0} if name in ("flux", "hunyuan") else {}))
    adapter = ModelAdapter.of(single)
    adapter.observe(make_call(single))
    assert adapter.blocks[0].outputs == reference.blocks[0].outputs


def test_blocks_chained_in_segments_reproduce_the_model(case):
    name, model, call = case
    adapter = ModelAdapter.of(model)
    seen = {}
    handles = []
    adapter.observe(call)
    for block in adapter.blocks:

        def hook(module, args, kwargs, result, index=block.index):
            seen[index] = result if isinstance(result, tuple) else (result,)

        handles.append(block.module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        full = model(**call, return_dict=False)[0]
    for handle in handles:
        handle.remove()

    assert [b.index for s in adapter.segments for b in s] == list(range(len(adapter.blocks)))
    assert len(adapter.segments) == (2 if name == "hunyuan" else 1)  # Hunyuan renames its rotary argument
    final = {}
    with torch.no_grad():
        for segment in adapter.segments:
            (state,) = catch_block_calls(model, adapter, segment[0].index, [call])
            for block in segment:
                (caught,) = catch_block_calls(model, adapter, block.index, [call])
                assert caught.streams.keys() == state.streams.keys()
                assert all(torch.equal(caught.streams[k], state.streams[k]) for k in state.streams)
                final = run_block(block.module, state, block.outputs)
                for stream, expected in zip(block.outputs, seen[block.index], strict=True):
                    assert torch.equal(final[stream], expected)
                state = state.with_streams(final)

        # put the chained streams in place of the last block's outputs: the head gives the same answer
        last = adapter.blocks[-1]
        values = tuple(final[s] for s in last.outputs)
        replacement = values if len(values) > 1 else values[0]
        handle = last.module.register_forward_hook(lambda *_: replacement)
        again = model(**call, return_dict=False)[0]
        handle.remove()
    assert torch.equal(full, again)


GRIDS = {
    "wan": (3, 2, 3),
    "cogvideox": (3, 2, 3),
    "hunyuan": (3, 2, 3),
    "ltx": (3, 2, 3),
    "flux": (1, 4, 3),
    "pixart": (1, 4, 4),
    "dit": (1, 4, 4),
}


def test_token_grid_counts_the_tokens_of_the_blocks(case):
    name, model, call = case
    adapter = ModelAdapter.of(model)
    grid = adapter.token_grid(call)
    assert (grid.frames, grid.height, grid.width) == GRIDS[name]
    assert grid.text_tokens == (0 if name == "dit" else 5)
    (caught,) = catch_block_calls(model, adapter, 0, [call])
    assert caught.streams["hidden_states"].shape[1] == grid.tokens


def test_token_grid_of_frames_that_look_like_channels():
    model = tiny.cogvideox(in_channels=3, out_channels=3)
    assert ModelAdapter.of(model).token_grid(tiny.cogvideox_call(model)).frames == 3


def test_a_call_without_a_grid_is_refused():
    model = tiny.ltx()
    call = tiny.ltx_call(model)
    del call["height"]
    with pytest.raises(AttarError, match="token grid cannot be told"):
        ModelAdapter.of(model).token_grid(call)
    with pytest.raises(AttarError, match="token grid cannot be told"):
        ModelAdapter.of(tiny.wan()).token_grid({"hidden_states": tiny.randn(1, 24, 4)})


def test_packed_layers_are_skipped():
    model = tiny.wan()
    adapter = ModelAdapter.of(model)
    model.blocks[1].attn1.to_q.is_attar_packed = True
    names = [line.name for line in adapter.linears(adapter.blocks[1])]
    assert "blocks.1.attn1.to_q" not in names and "blocks.1.attn1.to_k" in names


def test_a_refused_model_says_what_is_missing():
    with pytest.raises(AttarError, match="nothing is declared"):
        ModelAdapter.of(nn.Linear(4, 4))

    class Declares(nn.Module):
        _repeated_blocks = ("SomeBlock",)

    with pytest.raises(AttarError, match=r"no list of transformer blocks found .*SomeBlock"):
        ModelAdapter.of(Declares())

    class SomeBlock(nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    bare = Declares()
    bare.blocks = nn.ModuleList([SomeBlock(), SomeBlock()])
    with pytest.raises(AttarError, match="hold no linear layers"):
        ModelAdapter.of(bare)


def test_streams_need_an_observed_call():
    adapter = ModelAdapter.of(tiny.wan())
    with pytest.raises(AttarError, match="not known yet"):
        _ = adapter.blocks[0].outputs
    with pytest.raises(AttarError, match="not known yet"):
        _ = adapter.segments
    with pytest.raises(AttarError, match="not known yet"):
        adapter.joint_order(adapter.blocks[0])


def test_observing_leaves_the_model_as_it_was():
    model = tiny.wan()
    model.train()
    model.blocks[1].eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    ModelAdapter.of(model).observe(tiny.wan_call(model))
    assert model.training and model.blocks[0].attn1.training and not model.blocks[1].training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states, shift):
        return hidden_states + self.linear(hidden_states) + shift


class Stack(nn.Module):
    """Blocks registered in another order than they run, with an argument made anew for the last one."""

    _repeated_blocks = ("Step",)

    def __init__(self, twice=False):
        super().__init__()
        self.late = nn.ModuleList([Step(), Step()])
        self.early = nn.ModuleList([Step(), Step()])
        self.twice = twice

    def forward(self, hidden_states, shift):
        x = hidden_states
        for block in [
            *self.early,
            *self.late[: 1 if self.twice else 2],
            *self.late[: 1 if self.twice else 0],
        ]:
            x = block(x, shift * 2 if block is self.late[1] else shift)
        return x


def test_execution_order_and_segments_are_seen_not_assumed():
    torch.manual_seed(0)
    adapter = ModelAdapter.of(Stack())
    adapter.observe({"hidden_states": torch.randn(1, 3, 8), "shift": torch.randn(1, 1, 8)})
    assert [b.name for b in adapter.blocks] == ["early.0", "early.1", "late.0", "late.1"]
    assert [[b.index for b in s] for s in adapter.segments] == [[0, 1, 2], [3]]
    assert adapter.segment_of(adapter.blocks[1]) is adapter.segments[0]
    assert adapter.blocks[3].outputs == ("hidden_states",)


def test_a_block_that_runs_twice_is_refused():
    adapter = ModelAdapter.of(Stack(twice=True))
    with pytest.raises(AttarError, match="times in one forward"):
        adapter.observe({"hidden_states": torch.randn(1, 3, 8), "shift": torch.randn(1, 1, 8)})
