"""Everything that a user runs on a GPU, on one that is not there: no operation may mix devices."""

import pytest
import torch
from support import pipelines
from support.pretend_gpu import GPU, pretended_gpu

FEW = ("--set", "trace.prompts=2", "--set", "select.count=2", "--set", "reconstruct.epochs=1")
RUNS = {  # learned block by block, in memory and streamed; trained whole
    "attar-ptq": (*FEW, "--no-stream"),
    "s2q-vdit": (*FEW, "--stream"),
    "efficientdm": (*FEW[:2], "--set", "finetune.steps=4", "--no-stream"),
    "hadamard": ("--text-encoder-weights", "4", "--stream"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pipelines.save(tmp_path_factory.mktemp("models") / "wan")


@pytest.mark.parametrize("recipe", RUNS)
def test_compresses(recipe, cli, model, tmp_path):
    out = tmp_path / "small"
    with pretended_gpu():
        done = cli("compress", model, "-o", out, "--recipe", recipe, "--device", "cuda", *RUNS[recipe])
    assert done.code == 0, done.err
    if recipe != "attar-ptq":
        return
    with pretended_gpu():
        for command in (
            ("generate", out, "a red 3 moves left", "-o", tmp_path / "v.mp4"),
            ("compare", model, out, "-o", tmp_path / "report", "-n", "1"),
        ):
            done = cli(*command, "--device", "cuda")
            assert done.code == 0, done.err


def test_what_is_pretended():
    with pretended_gpu():
        there, here = torch.zeros(3, device="cuda"), torch.ones(3)
        layer = torch.nn.Linear(3, 3).to(device="cuda")
        assert there.device == layer(there).device == here.cuda().device == GPU and here.device.type == "cpu"
        layer(there).sum().backward()
        assert layer.weight.grad.device == torch.zeros_like(there).device == there[here.long()].device == GPU
        assert there.cpu().device == here.device and there.to(here).device == here.device
        with pytest.raises(RuntimeError, match="not on the same device"):
            there + here
        with pytest.raises(RuntimeError, match="not on the same device"):
            layer(here)
        with pytest.raises(RuntimeError, match="a generator of another device"):
            torch.randn(2, device="cuda", generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert torch.equal(there.copy_(here).cpu(), here) and (there + here.sum()).device == GPU
