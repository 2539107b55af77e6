"""Calls of blocks: moved, stored and run again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from torch import nn

from attar.calibration.catch import catch_block_calls
from attar.errors import AttarError
from attar.models.adapter import ModelAdapter
from attar.models.block import BlockCall, run_block


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_call_survives_safetensors(name, tmp_path):
    build, make_call = tiny.MODELS[name]
    model = build()
    adapter = ModelAdapter.of(model)
    block = adapter.blocks[-1]
    (call,) = catch_block_calls(model, adapter, block.index, [make_call(model, batch=2)])
    tensors, meta = call.flatten()
    save_file(tensors, tmp_path / "call.safetensors")
    back = BlockCall.unflatten(load_file(tmp_path / "call.safetensors"), json.loads(json.dumps(meta)))
    assert back.constants.keys() == call.constants.keys()
    with torch.no_grad():
        expected = run_block(block.module, call, block.outputs)
        got = run_block(block.module, back, block.outputs)
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_shared_tensors_are_stored_once():
    x = torch.randn(2, 3)
    tensors, meta = BlockCall({"x": x}, {"pair": (x, torch.ones(1)), "flag": True, "none": None}).flatten()
    assert set(tensors) == {"streams.x", "constants.pair.1"}
    back = BlockCall.unflatten(tensors, meta)
    assert back.constants["pair"][0] is back.streams["x"]
    assert back.constants["flag"] is True and back.constants["none"] is None


def test_only_floating_tensors_change_their_type():
    call = BlockCall({"x": torch.randn(2)}, {"mask": torch.tensor([True]), "tables": (torch.ones(1), None)})
    moved = call.to(device="cpu", dtype=torch.bfloat16)
    assert moved.streams["x"].dtype == torch.bfloat16 and moved.constants["mask"].dtype == torch.bool
    assert moved.constants["tables"][0].dtype == torch.bfloat16 and moved.constants["tables"][1] is None


def test_what_cannot_be_stored_is_named():
    with pytest.raises(AttarError, match=r"type object cannot be stored \[constants.thing\]"):
        BlockCall({}, {"thing": object()}).flatten()


class Variadic(nn.Module):
    def forward(self, x, y=None, *args, flag=False, **kwargs):
        return x + args[0], None, kwargs["extra"]


def test_variadic_arguments_and_outputs_that_are_no_streams():
    call = BlockCall({"x": torch.ones(1)}, {"y": None, "args": (torch.ones(1),), "kwargs": {"extra": 3}})
    out = run_block(Variadic(), call, ("x", "y", None))
    assert list(out) == ["x"] and out["x"].item() == 2


def test_wrong_number_of_outputs_and_unknown_arguments():
    with pytest.raises(AttarError, match="1 outputs for 2 names"):
        run_block(nn.Identity(), BlockCall({"input": torch.ones(1)}), ("a", "b"))
    with pytest.raises(AttarError, match="no argument 'hidden'"):
        run_block(nn.Identity(), BlockCall({"hidden": torch.ones(1)}), ("hidden",))
