"""Inputs of blocks, caught from the running model."""

import pytest
import torch
from support import tiny

from attar.calibration.catch import catch_block_calls
from attar.errors import AttarError
from attar.models.adapter import ModelAdapter
from attar.models.block import run_block


def test_calls_come_in_order_and_only_the_blocks_before_run():
    model = tiny.wan()
    adapter = ModelAdapter.of(model)
    calls = [tiny.wan_call(model, seed=s) for s in (0, 10, 20)]
    adapter.observe(calls[0])
    ran = []
    handles = [b.module.register_forward_hook(lambda *_, i=b.index: ran.append(i)) for b in adapter.blocks]
    caught = catch_block_calls(model, adapter, 1, calls)
    for handle in handles:
        handle.remove()
    assert ran == [0, 0, 0]
    assert not model.blocks[1]._forward_pre_hooks
    for call, one in zip(calls, caught, strict=True):
        (alone,) = catch_block_calls(model, adapter, 1, [call])
        assert torch.equal(alone.streams["hidden_states"], one.streams["hidden_states"])
    assert not torch.equal(caught[0].streams["hidden_states"], caught[1].streams["hidden_states"])


def test_streams_and_constants():
    model = tiny.flux()
    adapter = ModelAdapter.of(model)
    (call,) = catch_block_calls(model, adapter, 2, [tiny.flux_call(model)])
    assert set(call.streams) == {"encoder_hidden_states", "hidden_states"}
    assert set(call.constants) == {"temb", "image_rotary_emb", "joint_attention_kwargs"}
    model = tiny.wan()
    (call,) = catch_block_calls(model, ModelAdapter.of(model), 2, [tiny.wan_call(model)])
    assert set(call.streams) == {"hidden_states"}
    assert set(call.constants) == {"encoder_hidden_states", "temb", "rotary_emb"}


def test_equal_constants_are_kept_once():
    model = tiny.wan()
    first, second = (tiny.wan_call(model, seed=s) for s in (0, 10))
    a, b = catch_block_calls(model, ModelAdapter.of(model), 0, [first, second])
    assert a.constants["rotary_emb"][0] is b.constants["rotary_emb"][0]
    assert a.constants["encoder_hidden_states"] is not b.constants["encoder_hidden_states"]


def test_what_is_caught_is_detached_and_its_own():
    model = tiny.wan()
    call = tiny.wan_call(model)
    (one,) = catch_block_calls(model, ModelAdapter.of(model), 0, [call])
    assert not one.streams["hidden_states"].requires_grad
    assert one.streams["hidden_states"].is_contiguous()
    kept = one.streams["hidden_states"].clone()
    call["hidden_states"].zero_()
    assert torch.equal(kept, one.streams["hidden_states"])


def test_a_model_in_training_is_caught_in_evaluation_and_handed_back():
    model = tiny.pixart(dropout=0.5)
    expected = catch_block_calls(model, ModelAdapter.of(model), 2, [tiny.pixart_call(model)])
    model.train()
    adapter = ModelAdapter.of(model)
    got = catch_block_calls(model, adapter, 2, [tiny.pixart_call(model)])
    assert model.training
    assert torch.equal(expected[0].streams["hidden_states"], got[0].streams["hidden_states"])


def test_batched_and_single_calls_agree():
    model = tiny.hunyuan()
    adapter = ModelAdapter.of(model)
    call = tiny.hunyuan_call(model, batch=2)
    (both,) = catch_block_calls(model, adapter, 3, [call])
    second = {k: v[1:] for k, v in call.items()}
    (one,) = catch_block_calls(model, adapter, 3, [second])
    torch.testing.assert_close(both.streams["hidden_states"][1:], one.streams["hidden_states"])
    out = run_block(adapter.blocks[3].module, one, adapter.blocks[3].outputs)
    assert set(out) == {"hidden_states", "encoder_hidden_states"}


def test_no_calls():
    model = tiny.wan()
    with pytest.raises(AttarError, match="no transformer calls"):
        catch_block_calls(model, ModelAdapter.of(model), 0, [])
