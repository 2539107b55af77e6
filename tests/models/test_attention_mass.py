"""Attention received by each token, against the attention map written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attar.calibration.catch import catch_block_calls
from attar.errors import AttarError
from attar.models.adapter import ModelAdapter
from attar.models.attention_mass import attention_mass, column_mass
from attar.models.block import run_block


def written_out(query, key, mask=None, causal=False, scale=None):
    """The whole map in float64: (B, Lk)."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.double() @ key.double().transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        allowed = torch.ones(scores.shape[-2:]).tril().bool()
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0).sum((1, 2))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    groups=st.sampled_from([1, 2]),
    repeat=st.sampled_from([1, 3]),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    mask=st.sampled_from(["none", "padding", "rows", "additive", "empty row"]),
    budget=st.sampled_from([1, 500, 1 << 20]),
    scale=st.sampled_from([None, 0.3]),
)
def test_column_mass_is_the_written_out_one(seed, groups, repeat, queries, keys, mask, budget, scale):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, groups * repeat, queries, 4, generator=g) * 3
    k = torch.randn(2, groups, keys, 4, generator=g)
    m = None
    if mask == "padding":
        m = torch.ones(2, 1, 1, keys, dtype=torch.bool)
        m[0, ..., keys // 2 + 1 :] = False
    elif mask == "rows":
        m = torch.rand(2, 1, queries, keys, generator=g) > 0.3
        m[..., 0] = True
    elif mask == "additive":
        m = torch.randn(queries, keys, generator=g) * 4
    elif mask == "empty row":
        m = torch.ones(queries, keys, dtype=torch.bool)
        m[0] = False
    got = column_mass(q, k, m, scale=scale, budget=budget)
    torch.testing.assert_close(got.double(), written_out(q, k, m, scale=scale), rtol=1e-4, atol=1e-5)


def test_causal_attention():
    q, k = tiny.randn(1, 2, 7, 4), tiny.randn(1, 2, 7, 4, seed=1)
    got = column_mass(q, k, causal=True, budget=100)
    torch.testing.assert_close(got.double(), written_out(q, k, causal=True), rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation inside makes, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def test_no_operation_makes_more_than_the_budget():
    q, k = tiny.randn(1, 2, 600, 4), tiny.randn(1, 2, 600, 4, seed=1)
    with Largest() as largest:
        column_mass(q, k, torch.ones(1, 1, 1, 600, dtype=torch.bool), budget=1 << 16)
    assert largest.bytes <= 1 << 16 < 4 * 2 * 600 * 600


def test_permuting_the_keys_permutes_the_mass():
    q, k = tiny.randn(2, 2, 8, 4), tiny.randn(2, 2, 8, 4, seed=1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    mass = column_mass(q, k)
    torch.testing.assert_close(column_mass(q[:, :, order], k[:, :, order]), mass[:, order])


def measure(model, call, index):
    """(mass by stream, (query, key, mask) as they reached the first attention, adapter, caught call)."""
    adapter = ModelAdapter.of(model)
    block = adapter.blocks[index]
    (caught,) = catch_block_calls(model, adapter, index, [call])
    seen = []
    original = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **rest):
        seen.append((query.clone(), key.clone(), attn_mask))
        return original(query, key, value, attn_mask=attn_mask, **rest)

    with torch.no_grad():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", spy)
            plain = run_block(block.module, caught, block.outputs)
        with attention_mass(adapter, block, budget=2000) as mass:
            measured = run_block(block.module, caught, block.outputs)
    assert all(torch.equal(plain[k], measured[k]) for k in plain)
    return mass.per_stream(), seen[0], adapter, caught


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_mass_of_a_real_block(name, index):
    build, make_call = tiny.MODELS[name]
    model = build()
    call = make_call(model, batch=2)
    mass, (query, key, mask), adapter, caught = measure(model, call, index)
    order = adapter.joint_order(adapter.blocks[index])
    assert tuple(mass) == order
    expected = written_out(query, key, mask).float()
    torch.testing.assert_close(torch.cat([mass[n] for n in order], dim=1), expected, rtol=1e-4, atol=1e-5)
    total = sum(m.sum(1) for m in mass.values())
    torch.testing.assert_close(
        total, torch.full((2,), float(query.shape[1] * query.shape[2])), rtol=1e-4, atol=0
    )
    for stream, values in mass.items():
        assert values.shape == caught.streams[stream].shape[:2] and values.dtype == torch.float32
    if name == "hunyuan":  # the first prompt's padding gets nothing
        assert mass["encoder_hidden_states"][0, 3:].eq(0).all()
        assert mass["encoder_hidden_states"][1].gt(0).all()


@pytest.mark.parametrize("name", ["cogvideox", "flux", "hunyuan"])
def test_a_planted_token_is_found_in_its_own_stream(name):
    """Keys are made so that every query looks at one text token: the mass must appear there."""
    build, make_call = tiny.MODELS[name]
    model = build()
    adapter = ModelAdapter.of(model)
    block = adapter.blocks[0]
    (call,) = catch_block_calls(model, adapter, 0, [make_call(model, batch=1)])
    text_first = adapter.joint_order(block)[0] == "encoder_hidden_states"
    planted = 2 if text_first else call.streams["hidden_states"].shape[1] + 2
    original = F.scaled_dot_product_attention

    class Plant(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is original:
                arguments = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
                key = torch.zeros_like(arguments["key"])
                key[:, :, planted] = 1000.0
                return func(**arguments | {"query": torch.ones_like(arguments["query"]), "key": key})
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), attention_mass(adapter, block) as mass, Plant():
        run_block(block.module, call, block.outputs)
    received = mass.per_stream()
    assert received["encoder_hidden_states"].argmax(1).item() == 2
    assert received["hidden_states"].sum() < 1e-3 * received["encoder_hidden_states"].sum()


def test_permutation_equivariance_of_a_block():
    model = tiny.wan()
    adapter = ModelAdapter.of(model)
    block = adapter.blocks[1]
    (call,) = catch_block_calls(model, adapter, 1, [tiny.wan_call(model, batch=2)])
    order = torch.randperm(call.streams["hidden_states"].shape[1], generator=torch.Generator().manual_seed(3))
    moved = call.with_streams({"hidden_states": call.streams["hidden_states"][:, order]})
    moved.constants = {
        **call.constants,
        "rotary_emb": tuple(t[:, order] for t in call.constants["rotary_emb"]),
    }
    results = []
    for one in (call, moved):
        with torch.no_grad(), attention_mass(adapter, block) as mass:
            run_block(block.module, one, block.outputs)
        results.append(mass.per_stream()["hidden_states"])
    torch.testing.assert_close(results[1], results[0][:, order], rtol=1e-4, atol=1e-5)


def test_bfloat16_is_summed_in_float32():
    model = tiny.wan().to(torch.bfloat16)
    call = {k: v.to(torch.bfloat16) for k, v in tiny.wan_call(model, batch=1).items()}
    mass, (query, key, mask), _, _ = measure(model, call, 0)
    torch.testing.assert_close(
        mass["hidden_states"], written_out(query, key, mask).float(), rtol=1e-4, atol=1e-4
    )


def test_a_block_without_attention_has_no_mass():
    model = tiny.wan()
    adapter = ModelAdapter.of(model)
    (call,) = catch_block_calls(model, adapter, 0, [tiny.wan_call(model)])
    block = adapter.blocks[0]
    block.module.attn1 = Zero()
    with torch.no_grad(), attention_mass(adapter, block) as mass:
        run_block(block.module, call, block.outputs)
    assert mass.per_stream() == {}


class Zero(torch.nn.Module):
    def forward(self, hidden_states, *_):
        return torch.zeros_like(hidden_states)


class ByHand:
    """An attention processor that forms the map itself."""

    def __call__(self, attn, hidden_states, *_args, **_kwargs):
        return attn.to_out[0](attn.to_v(hidden_states))


def test_another_attention_backend_is_refused():
    model = tiny.wan()
    adapter = ModelAdapter.of(model)
    block = adapter.blocks[0]
    (call,) = catch_block_calls(model, adapter, 0, [tiny.wan_call(model)])
    block.module.attn1.processor = ByHand()
    with pytest.raises(AttarError, match="set_attention_backend"), attention_mass(adapter, block):
        run_block(block.module, call, block.outputs)
    assert not block.module.attn1._forward_hooks
