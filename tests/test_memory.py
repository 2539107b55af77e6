"""How much memory there is, and tensors that lie in files where it is short."""

import errno
import os
import sys

import psutil
import pytest
import torch
from support import pipelines

import attar
from attar import memory
from attar.errors import AttarError
from attar.runtime.layers import packed_layers


@pytest.fixture
def short(monkeypatch):
    """No memory is free, and every tensor is worth a file."""
    monkeypatch.setattr(memory, "free_memory", lambda: 0)
    monkeypatch.setattr(memory, "SMALL", 1)


def test_what_fits_stays_in_memory(tmp_path):
    x = torch.randn(1 << 19)
    assert memory.hold(x, tmp_path).data_ptr() == x.data_ptr()
    assert not memory.hold(x, tmp_path).is_shared()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_what_does_not_lies_in_a_file_without_a_name(short, tmp_path, dtype):
    x = (torch.randn(3, 5, 7) * 3).to(dtype).transpose(0, 1).requires_grad_(dtype.is_floating_point)
    held = memory.hold(x, tmp_path)
    assert torch.equal(held, x) and held.dtype == dtype and held.shape == x.shape and not held.requires_grad
    assert held.is_shared() and not list(tmp_path.iterdir())
    held.zero_()
    assert x.any()
    if sys.platform == "linux":
        with open("/proc/self/maps") as maps:
            assert any(str(tmp_path) in line and "(deleted)" in line for line in maps)


def test_a_full_disk_is_an_error(short, tmp_path, monkeypatch):
    def full(*place):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(AttarError, match="neither into memory nor on the disk"):
        memory.hold(torch.zeros(100), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_memory_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    machine = psutil.virtual_memory().total
    assert memory.total_memory() == machine and 0 < memory.free_memory() <= machine
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.total_memory() == machine
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 200000\nactive_file 100000\ninactive_file 250000\n")
    assert memory.total_memory() == 1000000 and memory.free_memory() == 650000


FEW = {"trace.prompts": 2, "select.count": 3, "reconstruct.epochs": 1}
BUDGET = {"allocate.samples": 2, "allocate.bits": [3, 4, 6], "allocate.act_bits": [4, 6]}


@pytest.mark.slow(but=["attar-ptq-overrides1"])
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [("attar", {**FEW, **BUDGET}), ("attar-ptq", {**FEW, "reconstruct.propagate": "quant"})],
)
def test_samples_on_the_disk_give_the_same_model(recipe, overrides, monkeypatch, tmp_path):
    def made():
        case = pipelines.CASES["hunyuan"]
        return attar.compress(
            pipelines.make("hunyuan"), recipe, overrides=overrides, prompts=pipelines.PROMPTS[:2],
            generation={**case.generation, "num_inference_steps": case.steps},
        )  # fmt: skip

    usual = packed_layers(made().transformer)
    monkeypatch.setattr(memory, "free_memory", lambda: 0)
    monkeypatch.setattr(memory, "SMALL", 1)
    files = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda name, **how: files.append(name) or from_file(name, **how))
    for name, layer in packed_layers(made().transformer).items():
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, usual[name].state_dict()[key]), f"{name}.{key}"
    assert len(files) > 10
