"""Everything that a user runs on a GPU, on one that is not there: no operation may mix devices."""

import json
from unittest import mock

import pytest
import torch
from support import pipelines
from support.pretend_gpu import GPU, on_gpu, pretended_gpu

import attar
from attar.errors import AttarError
from attar.evaluate.generate import generate
from attar.models.offload import computes_on
from attar.runtime.layers import PackedLinear, packed_layers

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


@pytest.mark.slow(but=["hadamard"])
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


@pytest.mark.slow(but=["model"])
@pytest.mark.parametrize("offload", ["model", "group"])
def test_what_does_not_run_waits_in_main_memory(offload, cli, model, tmp_path):
    small, call = tmp_path / "small", {"num_inference_steps": 2, "height": 16, "width": 16, "num_frames": 5}
    assert cli("compress", model, "-o", small, "--recipe", "hadamard").code == 0
    plain = generate(attar.load(str(small), device="cpu", dtype=torch.bfloat16), ["a red 3"], call=call)
    with pretended_gpu():
        pipe = attar.load(str(small), device="cuda", offload=offload)
        assert computes_on(pipe).type == "cuda"
        seen, run = [], PackedLinear._run
        with mock.patch.object(
            PackedLinear, "_run", lambda own, *_: seen.append(on_gpu(own.codes)) or run(own, *_)
        ):
            made = generate(pipe, ["a red 3"], call=call)
        held = [
            t for part in (pipe.transformer, pipe.text_encoder, pipe.vae) for t in part.state_dict().values()
        ]
        assert all(seen) and len(seen) == 4 * len(packed_layers(pipe.transformer))
        assert not any(on_gpu(tensor) for tensor in held)
        assert torch.equal(made.videos, plain.videos)
        done = cli(
            "compare", model, small, "-o", tmp_path / "report", "-n", "1", "--device", "cuda", "--offload", offload,
            "--height", "16", "--width", "32", "--frames", "5", "--steps", "2", "--guidance", "1", "--json",
        )  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["generation"] | {"height": 16, "width": 32, "frames": 5, "steps": 2} == report["generation"]
    assert report["generation"]["guidance_scale"] == 1 and report["compressed"]["backend"]


@pytest.mark.parametrize("offload", ["model", "group"])
def test_an_offloaded_pipeline_is_not_compressed(offload, model, tmp_path):
    with pretended_gpu():
        pipe = attar.load(model, device="cuda", offload=offload)
        with pytest.raises(AttarError, match="an offloaded pipeline is not compressed"):
            attar.compress(pipe, "rtn", workspace=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_pipeline_that_is_not_offloaded_so(tmp_path):
    folder = pipelines.save(tmp_path / "dit", "dit")
    with pretended_gpu(), pytest.raises(AttarError, match=r"does not support group offloading.*Use model"):
        attar.load(folder, device="cuda", offload="group")


@pytest.mark.parametrize("options", [{"offload": "disk"}, {"offload": "model", "device": "cpu"}])
def test_what_cannot_be_offloaded(options, model):
    with pytest.raises(AttarError, match="offload"):
        attar.load(model, **{"device": "cpu", **options})


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
