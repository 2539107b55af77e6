"""Compression with the weights left in their files: the same bytes as in memory, within a few blocks of memory."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from support import pipelines
from support.commands import contents

import attar
from attar.runtime.layers import packed_layers
from benchmarks.big_model import COGVIDEOX_5B, write_model

SMALL = ("--set", "trace.prompts=2", "--set", "select.count=3", "--set", "reconstruct.epochs=1")
OUTSIDE = ("--set", "quantize.roles={head: {weights: 8}}")
RUNS = {
    "no data": ("cogvideox", ("--recipe", "hadamard", *OUTSIDE)),
    "token weights": ("cogvideox", ("--recipe", "s2q-vdit", *SMALL, *OUTSIDE)),
    "two experts": (
        "wan22",
        (
            *("--recipe", "attar-ptq", *SMALL, "--set", "reconstruct.propagate=quant"),
            *("--set", "quantize.shift=true", "--set", "quantize.act_format=full_range"),
        ),
    ),
    "two segments": ("hunyuan", ("--recipe", "learned-base", *SMALL, "--set", "reconstruct.propagate=quant")),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Pipelines in folders, with bfloat16 transformers in shards of 40 kB."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for name in ("cogvideox", "wan22", "hunyuan"):
        pipe = pipelines.make(name)
        made[name] = pipelines.save(root / name, name, pipelines.CASES[name].steps, pipe=pipe)
        for part in ("transformer", "transformer_2"):
            if pipe.components.get(part) is not None:
                (made[name] / part / "diffusion_pytorch_model.safetensors").unlink()
                pipe.components[part].to(torch.bfloat16).save_pretrained(
                    made[name] / part, max_shard_size="40KB"
                )
    return made


@pytest.fixture(scope="module")
def whole(commands, models, tmp_path_factory):
    """The checkpoint that the pipeline in memory gives, made once for each kind of run."""
    made: dict[str, dict[str, bytes]] = {}

    def of(kind: str) -> dict[str, bytes]:
        if kind not in made:
            model, options = RUNS[kind]
            out = tmp_path_factory.mktemp("whole") / "small"
            assert commands.run("compress", models[model], "-o", out, "--no-stream", *options) == 0
            made[kind] = contents(out)
        return made[kind]

    return of


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_shift_is_in_the_biases_that_are_saved(stream, commands, models, tmp_path):
    """b + W z, of the source's b and W, in their type: the files of the source are not copied where a layer changed."""
    options = ("--recipe", "smoothquant", *SMALL[:4], "--set", "quantize.shift=true", "--acts", "8")
    assert commands.run("compress", models["wan22"], "-o", tmp_path / "small", stream, *options) == 0
    small = DiffusionPipeline.from_pretrained(tmp_path / "small", torch_dtype=torch.bfloat16)
    source = DiffusionPipeline.from_pretrained(models["wan22"], torch_dtype=torch.bfloat16)
    found = 0
    for part in ("transformer", "transformer_2"):
        for name, layer in packed_layers(getattr(small, part)).items():
            if len(layer.transforms):
                linear, shift = getattr(source, part).get_submodule(name), layer.transforms[0].shift.double()
                bias = (linear.bias.double() + linear.weight.double() @ shift).bfloat16()
                assert torch.equal(layer.bias, bias) and not torch.equal(bias, linear.bias)
                found += 1
    assert found


@pytest.mark.slow(but=["token weights", "no data"])
@pytest.mark.parametrize("kind", RUNS)
def test_streamed_and_in_memory_give_the_same_bytes(kind, commands, models, whole, tmp_path):
    model, options = RUNS[kind]
    out = tmp_path / "small"
    assert commands.run("compress", models[model], "-o", out, "--stream", *options) == 0
    assert contents(out) == whole(kind)


@pytest.mark.slow(but=["no data"])
@pytest.mark.parametrize("kind", ["no data", "two experts"])
def test_killed_and_resumed(kind, commands, models, whole, tmp_path):
    """Each process puts two files in their places and dies; every other one has the pipeline in memory."""
    model, options = RUNS[kind]
    out = tmp_path / "small"
    for turn in range(30):
        mode = "--stream" if turn % 2 else "--no-stream"
        if commands.run("compress", models[model], "-o", out, mode, *options, writes=2) == 0:
            break
        assert not out.exists()
    assert turn >= 2 and contents(out) == whole(kind)


def test_diffusers_loads_what_was_streamed(commands, models, tmp_path):
    out = tmp_path / "small"
    assert commands.run("compress", models["cogvideox"], "-o", out, "--stream", *RUNS["no data"][1]) == 0
    assert attar.verify_folder(out) == [out / "transformer"]
    pipe = DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert bool(torch.isfinite(pipelines.generate(pipe, "cogvideox")).all())
    pipe.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again").transformer.state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in pipe.transformer.state_dict().items())


def test_the_way_is_chosen_and_said(cli, models, tmp_path, monkeypatch):
    done = cli("compress", models["cogvideox"], "--dry-run", "--recipe", "rtn")
    assert done.code == 0 and "weights streamed: the recipe needs no data" in done.err
    done = cli("compress", models["cogvideox"], "--dry-run", "--recipe", "smoothquant", *SMALL[:4])
    assert done.code == 0 and "weights in memory: the whole pipeline needs about" in done.err
    whole = done.out
    monkeypatch.setattr("attar.models.memory.free_bytes", lambda device: 1000)
    done = cli("compress", models["cogvideox"], "--dry-run", "--recipe", "smoothquant", *SMALL[:4])
    assert done.code == 0 and "weights streamed: the whole pipeline needs about" in done.err
    assert done.out.splitlines()[:-2] == whole.splitlines()[:-2]  # but for time and memory


def test_errors_are_those_of_the_pipeline_in_memory(cli, models, tmp_path):
    out = tmp_path / "small"
    assert cli("compress", models["cogvideox"], "-o", out, "--stream", "--recipe", "hadamard").code == 0
    again = cli("compress", out, "-o", tmp_path / "twice", "--recipe", "rtn").message
    assert "the model is already compressed" in again
    forced = cli("compress", out, "-o", tmp_path / "twice", "--recipe", "rtn", "--stream").message
    assert "cannot be streamed: the model is already compressed" in forced


# what the jobs add to the peak memory of a process behind its imports
MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
import attar.cli, attar.conductor, attar.forecast.dry_run, attar.save

def peak():
    # not ru_maxrss, which counts what the process had been before it became this one
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

first, jobs = json.loads(sys.argv[1])
for number, job in enumerate(first + jobs):
    if number == len(first):
        before = peak()
    if job[0] == "load":
        model = CogVideoXTransformer3DModel.from_pretrained(job[1], torch_dtype=torch.bfloat16)
        assert model.dtype == torch.bfloat16
    else:
        sys.argv = ["attar", *job]
        attar.cli.main()
print(peak() - before)
"""
LAYERS, BLOCK = 16, 6.4e6  # of the model that is measured: blocks, and parameters in each


def growth(jobs: list[list[str]], first: Sequence[list[str]] = ()) -> int:
    """Bytes that the jobs add to the peak memory of a process that has done the first ones."""
    command = [sys.executable, "-c", MEASURE, json.dumps([list(first), jobs])]
    # the C library keeps no tensors for later, or what it keeps is most of the growth
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux gives it")
@pytest.mark.parametrize("recipe", ["rtn", pytest.param("smoothquant", marks=pytest.mark.slow)])
def test_memory_is_a_few_blocks_and_loading_takes_the_packed_size(recipe, tmp_path):
    config = {**COGVIDEOX_5B, "num_attention_heads": 8}
    write_model(tmp_path / "short", {**config, "num_layers": 2}, 100_000_000)
    write_model(tmp_path / "long", {**config, "num_layers": LAYERS}, 100_000_000)
    assert len(list((tmp_path / "long" / "transformer").glob("*.safetensors"))) == 3
    few = ["--set", "trace.prompts=1", "--set", "trace.steps=1", "--set", "select.count=1"]

    def compress(model):
        out = str(tmp_path / f"{model}-small")
        given = ["--recipe", recipe, *(few if recipe == "smoothquant" else [])]
        return ["compress", str(tmp_path / model), "--stream", "-o", out, *given]

    # of a model in float32 that is eight times as long
    assert growth([compress("long")], [compress("short")]) < 3 * 4 * BLOCK < 0.2 * LAYERS * 4 * BLOCK
    out = tmp_path / "long-small"
    packed = sum(path.stat().st_size for path in (out / "transformer").glob("*.safetensors"))
    assert packed < 0.3 * 2 * LAYERS * BLOCK
    if recipe != "rtn":
        return
    # the files are mapped while they are read, so the packed weights may count twice
    assert growth([["load", str(out / "transformer")]]) < 2.5 * packed < 0.8 * 2 * LAYERS * BLOCK
