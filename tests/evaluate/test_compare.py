"""Paired comparison of a compressed pipeline with its original."""

import json
import math
import shutil
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file
from support import pipelines

import attar
from attar.errors import AttarError, calling
from attar.evaluate.compare import _Recorder, _timestep_errors, compare
from attar.evaluate.generate import generate
from attar.models.source import find_source
from attar.progress import SilentProgress
from attar.runtime import backend_description

PROMPTS = pipelines.PROMPTS[:2]


@pytest.fixture(scope="module")
def small(commands, wan_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "small"
    settings = ("trace.prompts=2", "select.count=3", "reconstruct.epochs=1")
    options = [part for setting in settings for part in ("--set", setting)]
    assert commands.run("compress", wan_folder, "-o", out, "--recipe", "s2q-vdit", *options) == 0
    return out


def run(reference, compressed, out, **options):
    sources = find_source(str(reference)), find_source(str(compressed))
    return compare(*sources, PROMPTS, out, progress=SilentProgress(), **options)


def test_the_report(wan_folder, small, tmp_path):
    data = run(wan_folder, small, tmp_path / "report", seed=7)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "small beside wan" in page and len(list((tmp_path / "report" / "videos").iterdir())) == 4
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["compressed"]["bits"] == "W4A6" and found["reference"]["bits"] == "float32"
    assert found["compressed"]["parts"]["transformer"] < found["reference"]["parts"]["transformer"]
    assert found["compressed"]["backend"] == backend_description() and found["reference"]["backend"] is None
    assert [pair["seed"] for pair in found["pairs"]] == [7, 8]
    assert all(10 < pair["psnr"] < 80 for pair in found["pairs"])
    assert [row["step"] for row in found["timestep_errors"]] == [0, 1, 2]
    assert all(0 < row["error"] < 0.1 for row in found["timestep_errors"])
    assert [row["block"] for row in found["block_errors"]] == [f"blocks.{k}" for k in range(3)]
    assert len(found["attention"]) == 3 and found["plan"]
    assert len(found["selection"]["chosen"]) == 3 and len(found["selection"]["scores"][0]) == 3
    assert data.generation.steps == 3 and data.generation.frames == 9
    assert "videos of the original are timed first" in page


def test_one_model_is_in_memory_at_a_time(wan_folder, small, tmp_path, monkeypatch):
    """Also where hooks, as pipelines leave them behind, refer back to the modules that they are of."""
    module = sys.modules["attar.evaluate.compare"]
    alive, load = [], module.load_pipeline

    def loading(source, **options):
        assert not any(part() is not None for part in alive)
        pipe = load(source, **options)
        alive.extend(
            weakref.ref(part) for part in pipe.components.values() if isinstance(part, torch.nn.Module)
        )
        return pipe

    monkeypatch.setattr(module, "load_pipeline", loading)
    run(wan_folder, small, tmp_path / "report")
    assert len(alive) == 6


def test_an_original_with_older_weight_files(wan_folder, small, tmp_path):
    older = shutil.copytree(wan_folder, tmp_path / "older")
    for path in older.rglob("*.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    (older / "text_encoder" / "model.bin").rename(older / "text_encoder" / "pytorch_model.bin")
    data = run(older, small, tmp_path / "report")
    assert data.reference.parts["transformer"] > data.compressed.parts["transformer"]


def test_a_model_beside_itself(wan_folder, tmp_path):
    data = run(wan_folder, wan_folder, tmp_path)
    assert all(pair.psnr == math.inf and pair.ssim == pytest.approx(1) for pair in data.pairs)
    assert all(row.error == 0 for row in data.timestep_errors)
    assert data.selection is None and data.block_errors == []


def test_what_a_call_leaves_to_the_pipeline(tmp_path):
    """Steps and guidance in the report are those that ran, where the model's folder does not say."""
    folder = pipelines.save(tmp_path / "flux", "flux")
    settings = json.loads((folder / "generation.json").read_text())
    for name in ("num_inference_steps", "guidance_scale"):
        settings.pop(name, None)
    (folder / "generation.json").write_text(json.dumps(settings))
    made = run(folder, folder, tmp_path / "report").generation
    assert (made.steps, made.guidance_scale) == (28, 3.5)  # the defaults of FluxPipeline


def test_two_compressed_models_and_groups_of_steps(commands, wan_folder, small, tmp_path):
    groups = tmp_path / "groups"
    options = ("--recipe", "rtn", "--set", "quantize.step_groups=2", "--set", "quantize.acts=[8, 4]")
    assert commands.run("compress", wan_folder, "-o", groups, *options) == 0
    data = run(small, groups, tmp_path / "report")
    assert data.reference.bits == "W4A6" and data.reference.backend == backend_description()
    assert data.compressed.bits == "W4A8/4"
    assert "compressed too, by the recipe s2q-vdit" in " ".join(data.notes)


def test_types_are_those_that_the_models_work_in(cli, tmp_path):
    """Some parameters of Wan stay in float32 whatever type is asked for, the first one among them."""
    pipe = pipelines.make("wan").to(torch.bfloat16)
    folder = pipelines.save(tmp_path / "wan", pipe=pipe)
    small = tmp_path / "small"
    assert cli("compress", folder, "-o", small, "--recipe", "rtn", "--dtype", "bfloat16").code == 0
    assert "torch_dtype=torch.bfloat16" in (small / "README.md").read_text()
    assert run(folder, small, tmp_path / "report", dtype=torch.bfloat16).reference.bits == "bfloat16"


def test_what_is_equal_is_not_in_the_mean(cli, wan_folder, small, tmp_path, monkeypatch):
    values = torch.tensor([float("inf"), 30.0])
    monkeypatch.setattr("attar.evaluate.compare.psnr", lambda *_: values)
    done = cli("compare", wan_folder, small, "-o", tmp_path / "report", "-n", "2")
    assert "2 pairs, PSNR 30.00 dB and 1 equal" in done.out
    values[1] = float("inf")
    done = cli("compare", wan_folder, small, "-o", tmp_path / "report", "-n", "2")
    assert "2 pairs, all equal" in done.out


@pytest.mark.parametrize("name", ["wan", "wan22", "cogvideox", "hunyuan", "ltx", "flux", "pixart", "dit"])
def test_recorded_calls_give_what_they_gave(name):
    """One call for each step of the first video only, whatever the pipeline does about guidance."""
    case, pipe = pipelines.CASES[name], pipelines.make(name)
    with _Recorder(pipe, case.steps) as recorded:
        for seed in (0, 1):
            pipelines.generate(pipe, name, seed=seed)
    assert [step for step, *_ in recorded.calls] == list(range(case.steps))
    assert {component for _, component, *_ in recorded.calls} == (
        {"transformer", "transformer_2"} if name == "wan22" else {"transformer"}
    )
    assert not pipe.transformer._forward_hooks
    errors = _timestep_errors(pipe, recorded)
    assert len(errors) == case.steps and all(row.error < 1e-10 for row in errors)
    times = [row.timestep for row in errors]
    assert times == sorted(times, reverse=True) and len(set(times)) == case.steps
    attar.compress(pipe, "rtn", weights=8, acts=8)
    assert all(0 < row.error < 0.1 for row in _timestep_errors(pipe, recorded))


def test_only_some_steps_are_recorded(monkeypatch):
    monkeypatch.setattr("attar.evaluate.compare.ERROR_POINTS", 3)
    pipe = pipelines.make("wan")
    with _Recorder(pipe, 9) as recorded:
        pipelines.generate(pipe, "wan", num_inference_steps=9)
    assert [step for step, *_ in recorded.calls] == [0, 4, 8]
    with _Recorder(pipe, 1) as recorded:
        pipelines.generate(pipe, "wan", num_inference_steps=1)
        pipelines.generate(pipe, "wan", num_inference_steps=1)
    assert [step for step, *_ in recorded.calls] == [0]


def test_models_that_do_not_belong_together(wan_folder, tmp_path):
    ltx = pipelines.save(tmp_path / "ltx", "ltx")
    with pytest.raises(AttarError, match="a WanPipeline cannot be compared with a LTXPipeline"):
        run(wan_folder, ltx, tmp_path / "report", overrides={"num_inference_steps": 1})
    assert not (tmp_path / "report").exists()


# ---------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize(("name", "frames"), [("wan", 9), ("flux", 1), ("pixart", 1), ("dit", 1)])
def test_videos_and_images_from_seeded_noise(name, frames):
    case, pipe = pipelines.CASES[name], pipelines.make(name)
    done = []
    options = {**case.generation, "num_inference_steps": 2}
    made = generate(pipe, PROMPTS, seed=4, call=options, step=done.append)
    assert made.videos.shape[:3] == (2, frames, 3) and made.videos.dtype == torch.float32
    assert made.videos.min() >= 0 and made.videos.max() <= 1 and len(made.seconds) == 2
    assert done == [1, 2, 3, 4]
    alone = generate(pipe, PROMPTS[1:], seed=5, call=options)
    assert torch.equal(alone.videos[0], made.videos[1])


def test_what_cannot_be_generated():
    pipe = pipelines.make("wan")
    with pytest.raises(AttarError, match=r"rejects its arguments.*colour"):
        generate(pipe, PROMPTS, call={"colour": "red"})
    pipe.transformer.proj_out.bias.data[0] = torch.nan
    with pytest.raises(AttarError, match=r"not finite \[a red fox runs\]"):
        generate(pipe, PROMPTS, call={**pipelines.CASES["wan"].generation, "num_inference_steps": 1})


def test_a_device_that_fails_is_no_bad_argument():
    """CUDA's own errors come out of whatever the pipeline does next."""
    pipe = pipelines.make("wan")
    faults = (
        RuntimeError("CUDA error: an illegal memory access"),
        torch.AcceleratorError("misaligned address"),
    )
    for fault in faults:
        with (
            pytest.raises(AttarError, match=r"the device failed \(.*\[WanPipeline\].*--device cpu"),
            calling(pipe),
        ):
            raise fault
