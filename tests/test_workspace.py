"""The workspace: whole files, claims, and what is refused."""

import os

import pytest
import torch

from attar.errors import AttarError
from attar.files import writing
from attar.workspace import Workspace

JOB = {"recipe": {"name": "x"}, "seed": 0}


def test_claims(tmp_path):
    first = Workspace(tmp_path / "work")
    first.claim(JOB)
    with pytest.raises(AttarError, match="another process works in the workspace"):
        Workspace(tmp_path / "work").claim(JOB)
    first.release()
    again = Workspace(tmp_path / "work")
    again.claim({"seed": 0, "recipe": {"name": "x"}})
    again.release()
    with pytest.raises(AttarError, match=r"another job \(different: seed\)"):
        Workspace(tmp_path / "work").claim({**JOB, "seed": 1})
    with pytest.raises(AttarError, match=r"different: prompts, recipe"):
        Workspace(tmp_path / "work").claim({"seed": 0, "prompts": []})
    Workspace(tmp_path / "work").claim(JOB)  # a refusal keeps nothing locked


def test_a_run_killed_before_its_first_file(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".job.json.123.tmp").write_text("{")
    Workspace(tmp_path).claim(JOB)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "job.json"]


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / ".notes.tmp").write_text("dear")
    with pytest.raises(AttarError, match="holds no attar job"):
        Workspace(tmp_path).claim(JOB)
    assert [p.name for p in tmp_path.iterdir()] == [".notes.tmp"]


def test_tensors_come_back(tmp_path):
    work = Workspace(tmp_path)
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "part": whole[1:], "rest": whole[:1], "turned": whole.T, "same": whole, "again": whole,
        "half": torch.randn(3).bfloat16(), "codes": torch.arange(5, dtype=torch.uint8), "flag": torch.tensor(True),
        "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5),
    }  # fmt: skip
    work.write_tensors("a/b.safetensors", tensors, {"list": [1, None, "ü"], "value": 0.1})
    found, meta = work.read_tensors("a/b.safetensors")
    assert meta == {"list": [1, None, "ü"], "value": 0.1}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    first = (tmp_path / "a/b.safetensors").read_bytes()
    for _ in range(3):
        work.write_tensors("a/b.safetensors", tensors, {"list": [1, None, "ü"], "value": 0.1})
        assert (tmp_path / "a/b.safetensors").read_bytes() == first
    assert work.read_tensors("none") is None and work.read_json("none") is None


@pytest.mark.parametrize("where", [0, 8, 60, -1])
def test_changed_bytes_are_noticed(tmp_path, where):
    work = Workspace(tmp_path)
    work.write_tensors("x.safetensors", {"a": torch.randn(4, 4)}, {"b": 1})
    content = bytearray((tmp_path / "x.safetensors").read_bytes())
    content[where] ^= 1
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(AttarError, match=r"the file is damaged .*Delete it and run again"):
        work.read_tensors("x.safetensors")


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    work = Workspace(tmp_path)
    work.write_json("x.json", 1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(AttarError, match="the disk is full"):
        work.write_json("x.json", 2)
    monkeypatch.setattr(
        os, "fsync", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(AttarError, match=r"cannot be written \(Permission denied\)"):
        work.write_json("x.json", 2)
    assert work.read_json("x.json") == 1 and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "x") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
