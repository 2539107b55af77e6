"""Trace files: exact, compact, whole or refused."""

import pytest
import torch
from safetensors.torch import load_file

from attar.calibration.store import PromptRecord, TensorPool, TraceStore
from attar.errors import AttarError


def record(steps=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    text, tables = torch.randn(1, 5, 8, generator=g), (torch.randn(4, 2, generator=g), torch.ones(4, 2))
    x = torch.randn(1, 2, 3, generator=g).to(dtype)
    made = PromptRecord({"prompt": "a red fox", "seed": 1, "steps": steps})
    made.add_latents(x)
    for t in range(steps):
        for branch in (text, -text):
            kwargs = {
                "hidden_states": x,
                "encoder_hidden_states": branch.clone(),
                "rotary": tuple(table.clone() for table in tables),
                "timestep": torch.tensor([float(t)]),
                "extra": {"scale": 0.5, "names": ["a", None], "dtype": torch.bfloat16},
                "return_dict": False,
            }
            made.add_call("transformer", kwargs)
        x = x + torch.randn(1, 2, 3, generator=g).to(dtype)
        made.end_step(1000.0 - t, x)
    made.end(x)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path, dtype):
    store = TraceStore(tmp_path / "trace")
    assert store.prompts_done() == []
    store.save_prompt(2, record(dtype=dtype))
    store = TraceStore(tmp_path / "trace")
    assert store.prompts_done() == [2] and store.steps(2) == 3
    x, timesteps = store.latents(2)
    assert x.shape == (4, 1, 2, 3) and x.dtype == dtype
    assert timesteps.tolist() == [1000.0, 999.0, 998.0]
    assert torch.equal(store.final_latents(2), x[-1])
    assert store.settings(2)["prompt"] == "a red fox"
    for t in range(3):
        cond, uncond = store.calls("transformer", 2, t)
        assert torch.equal(cond["hidden_states"], x[t]) and cond["hidden_states"].dtype == dtype
        assert torch.equal(cond["encoder_hidden_states"], -uncond["encoder_hidden_states"])
        assert isinstance(cond["rotary"], tuple) and torch.equal(cond["rotary"][1], torch.ones(4, 2))
        assert cond["extra"] == {"scale": 0.5, "names": ["a", None], "dtype": torch.bfloat16}
        assert cond["return_dict"] is False
        assert store.components(2, t) == ["transformer"]
    assert store.calls("transformer_2", 2, 0) == []


def test_every_distinct_tensor_is_stored_once(tmp_path):
    store = TraceStore(tmp_path)
    store.save_prompt(0, record(steps=3))
    stored = load_file(store.path(0))
    # 4 latents, 2 text embeddings, 2 rotary tables, 3 timesteps
    assert len(stored) == 4 + 2 + 2 + 3


def test_a_tensor_written_over_in_place_is_another_one():
    pool = TensorPool()
    x = torch.zeros(3)
    first = pool.put("x", x)
    assert pool.put("x", x) == first
    x.add_(1)
    second = pool.put("x", x)
    assert second != first and pool.tensors[first].sum() == 0


def test_same_bytes_of_another_shape_or_type_are_told_apart():
    pool = TensorPool()
    x = torch.zeros(4)
    assert len({pool.put("x", v) for v in (x, x.view(2, 2), x.view(torch.int32))}) == 3


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    store = TraceStore(tmp_path)
    store.save_prompt(0, record())
    data = store.path(0).read_bytes()
    store.path(0).write_bytes(data[:keep])
    with pytest.raises(AttarError, match="damaged"):
        TraceStore(tmp_path).prompts_done()


def test_changed_bytes_are_refused(tmp_path):
    store = TraceStore(tmp_path)
    store.save_prompt(0, record())
    data = bytearray(store.path(0).read_bytes())
    data[-3] ^= 1
    store.path(0).write_bytes(data)
    opened = TraceStore(tmp_path)
    with pytest.raises(AttarError, match="does not match its checksum"):
        opened.latents(0)
        for t in range(3):
            opened.calls("transformer", 0, t)


def test_a_changed_description_is_refused(tmp_path):
    store = TraceStore(tmp_path)
    store.save_prompt(0, record())
    data = store.path(0).read_bytes()
    assert data.count(b"a red fox") == 1
    store.path(0).write_bytes(data.replace(b"a red fox", b"a red cat"))
    with pytest.raises(AttarError, match="description does not match"):
        TraceStore(tmp_path).settings(0)


def test_other_files_and_missing_prompts(tmp_path):
    store = TraceStore(tmp_path)
    (tmp_path / ".prompt-0000.1.tmp").write_bytes(b"left by a killed run")
    (tmp_path / "notes.txt").write_text("x")
    assert store.prompts_done() == []
    with pytest.raises(AttarError, match="has not been traced"):
        store.latents(0)


def test_an_unfinished_record_is_not_written(tmp_path):
    made = PromptRecord({})
    made.add_latents(torch.zeros(1))
    with pytest.raises(AttarError, match="not complete"):
        TraceStore(tmp_path).save_prompt(0, made)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    store = TraceStore(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("attar.calibration.store.os.replace", fail)
    with pytest.raises(AttarError, match="disk full"):
        store.save_prompt(0, record())
    assert list(tmp_path.iterdir()) == []
