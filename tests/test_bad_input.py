"""Whatever a user can get wrong is one clear line and an exit code, with nothing half-written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import pipelines, tiny
from support.fixtures import SMALL
from torch import nn

import attar
from attar.errors import AttarError
from attar.runtime.layers import packed_layers

SHORT = ("--recipe", "hadamard")


@pytest.fixture
def model(wan_folder, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(wan_folder, tmp_path / "model"))


@pytest.fixture
def small(cli, wan_folder, tmp_path):
    """A compressed model."""
    assert cli("compress", wan_folder, "-o", tmp_path / "packed", *SHORT).code == 0
    return tmp_path / "packed"


@pytest.fixture
def refuses(cli, tmp_path):
    """Runs a command that has to fail; returns its one line."""

    def run(*args: object) -> str:
        before = set(tmp_path.rglob("*"))
        message = cli(*args).message
        new = set(tmp_path.rglob("*")) - before
        work = tmp_path / "out.work"  # what is finished may stay in the workspace
        assert all(p == work or work in p.parents for p in new), new
        assert not [p for p in new if p.name.endswith((".tmp", "-partial", "-former"))]
        return message

    return run


def compress(model: Path, tmp_path: Path, *options: object) -> tuple:
    return ("compress", model, "-o", tmp_path / "out", *options)


# ------------------------------------------------------------------------------------------------ recipe


def test_recipes_that_do_not_exist(refuses, wan_folder, tmp_path):
    message = refuses(*compress(wan_folder, tmp_path, "--recipe", "s3q"))
    assert "unknown recipe 's3q'" in message and "s2q-vdit" in message
    assert "no such recipe file [nowhere.yaml]" in refuses(
        *compress(wan_folder, tmp_path, "--recipe", "nowhere.yaml")
    )
    assert "unknown recipe 's3q'" in refuses("recipes", "show", "s3q")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: mine\nquantise: {weights: 4}\n", "unknown key 'quantise'"),
        ("name: mine\nquantize: {weight: 4}\n", "unknown key 'quantize.weight'"),
        ("quantize: {weights: 4}\n", "name: Field required"),
        ("- a\n- b\n", "not a mapping"),
        ("name: [\n", "not valid YAML"),
        ("name: mine\n3: 4\n", "cannot be read"),
        ("name: mine\nselect: {policy: best}\n", "unknown value 'best'"),
        ("name: mine\ntrace: null\n", "no trace or select stage"),
        ("name: mine\nquantize: {rotation: hadamard, affine: true}\n", "affine needs the rotation kronecker"),
        ("name: mine\nquantize: {rotation_init: zero}\n", "rotation_init"),
        ("name: mine\nreconstruct: {lambda_min: 2.0}\n", "lambda_min is larger"),
        ("name: mine\nquantize: 4\n", "quantize"),
        ("\x00\x01\x02", "not valid YAML"),
        ("", "not a mapping"),
    ],
)
def test_recipe_files_with_mistakes(refuses, wan_folder, tmp_path, text, says):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    message = refuses(*compress(wan_folder, tmp_path, "--recipe", file))
    assert says in message and "mine.yaml" in message


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("foo.bar=1", "unknown key 'foo'"),
        ("quantize.bits=4", "unknown key 'quantize.bits'"),
        ("quantize.weights", "is no assignment"),
        ("=4", "is no assignment"),
        ("name.first=4", "does not name a setting"),
        ("quantize.weights=[", "cannot be read"),
        ("quantize.weights=x", "quantize.weights = 'x'"),
        ("quantize.weights=4.5", "quantize.weights = 4.5"),
        ("quantize.roles={ffn.up: {weights: 1}}", "weights cannot be 1 bits [ffn.up]"),
        ("quantize.roles={nothing: {skip: true}}", "matches no layer [nothing]"),
        ("quantize.roles={'*': {skip: true}}", "keeps every layer in full precision"),
        ("select.count=0", "select.count = 0"),
        ("reconstruct.clip_lr=.inf", "reconstruct.clip_lr = inf"),
        ("quantize.alpha=.nan", "quantize.alpha = nan"),
    ],
)
def test_settings_that_do_not_exist(refuses, wan_folder, tmp_path, assignment, says):
    assert says in refuses(*compress(wan_folder, tmp_path, *SHORT, "--set", assignment))


@pytest.mark.parametrize("bits", ["0", "1", "9", "-4", "x"])
@pytest.mark.parametrize("kind", ["weights", "acts"])
def test_impossible_bits(refuses, wan_folder, tmp_path, kind, bits):
    message = refuses(*compress(wan_folder, tmp_path, f"--{kind}", bits))
    assert kind in message and ("between 2 and 8" in message or "integer" in message)


def test_arguments_that_are_no_such_thing(refuses, wan_folder, tmp_path):
    assert "no such device here [gpu]" in refuses(*compress(wan_folder, tmp_path, *SHORT, "--device", "gpu"))
    assert "no such device here [meta]" in refuses(
        *compress(wan_folder, tmp_path, *SHORT, "--device", "meta")
    )
    assert "unknown dtype 'int4'" in refuses(*compress(wan_folder, tmp_path, "--dtype", "int4"))
    assert "--seed" in refuses(*compress(wan_folder, tmp_path, "--seed", "-1"))
    assert "no output folder" in refuses("compress", wan_folder)
    assert "No such option" in refuses("compress", wan_folder, "--bits", "4")
    assert "No such command" in refuses("squeeze")
    with pytest.raises(AttarError, match="the seed cannot be -1"):
        attar.compress(pipelines.make("wan"), "rtn", seed=-1)


# ------------------------------------------------------------------------------------------------- model


def test_models_that_are_none(refuses, wan_folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert "model_index.json is missing" in refuses(*compress(tmp_path / "empty", tmp_path))
    assert "not a file" in refuses(*compress(wan_folder / "model_index.json", tmp_path))
    assert "no such model [./nowhere]" in refuses(*compress("./nowhere", tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub gives no such model" in refuses(*compress("nobody/nothing", tmp_path))


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.999])
def test_truncated_weights(refuses, model, tmp_path, kept):
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    message = refuses(*compress(model, tmp_path, *SHORT))
    assert "damaged or incomplete" in message and "transformer/diffusion_pytorch_model.safetensors" in message


@pytest.mark.parametrize("part", ["vae", "transformer", "text_encoder", "tokenizer", "scheduler"])
def test_missing_components(refuses, model, tmp_path, part):
    shutil.rmtree(model / part)
    assert "cannot be loaded" in refuses(*compress(model, tmp_path, *SHORT))


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "vae/config.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"_class_name": "NoSuchClass"}', "\x00"])
def test_broken_descriptions(refuses, model, tmp_path, name, text):
    (model / name).write_text(text)
    assert refuses(*compress(model, tmp_path, *SHORT))


def test_weights_of_another_shape(refuses, model, tmp_path):
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    assert "cannot be loaded" in refuses(*compress(model, tmp_path, *SHORT))


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "blocks.0.attn1.to_q.weight"),
        ("text_encoder/model.safetensors", "shared.weight"),
        ("text_encoder/model.safetensors", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
    ],
)
def test_a_tensor_is_missing(refuses, model, tmp_path, file, tensor, how):
    """diffusers leaves it on the meta device, and transformers fills it with random numbers."""
    tensors = load_file(model / file)
    name = "encoder.embed_tokens.weight" if tensor == "shared.weight" else tensor  # two names of one
    del tensors[tensor]
    save_file(tensors, model / file, metadata={"format": "pt"})
    message = refuses(*compress(model, tmp_path, *SHORT, how))
    assert repr(name) in message and file.partition("/")[0] in message
    if how == "--no-stream":
        message = refuses("generate", model, "a dog", "-o", tmp_path / "x.mp4")
        assert f"tensor {name!r} is missing from the weight files [{file.partition('/')[0]}]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(refuses, model, tmp_path, value):
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.1.ffn.net.2.weight"][3, 4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    message = refuses(*compress(model, tmp_path, *SHORT))
    assert "a weight is not finite [transformer.blocks.1.ffn.net.2.weight]" in message


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
@pytest.mark.parametrize(
    "file", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
)
def test_other_components_that_are_not_finite(refuses, model, tmp_path, file, how):
    """A recipe without data never runs them, but they are what the checkpoint is made of."""
    tensors = load_file(model / file)
    name = sorted(name for name in tensors if name.endswith("weight"))[-1]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, model / file, metadata={"format": "pt"})
    message = refuses(*compress(model, tmp_path, *SHORT, how))
    assert f"a weight is not finite [{file.partition('/')[0]}.{name}]" in message


def test_weights_that_may_not_be_read(refuses, model, tmp_path, monkeypatch):
    """The advice to download a file again would not help."""
    from attar.models import source

    def closed(path, framework):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(source, "safe_open", closed)
    message = refuses("generate", model, "a dog", "-o", tmp_path / "x.mp4")
    assert "may not be read" in message and "permissions" in message


@pytest.mark.slow(but=["hadamard"])
@pytest.mark.parametrize("recipe", ["hadamard", "s2q-vdit"])
def test_widths_without_a_rotation(refuses, cli, model, tmp_path, recipe):
    """Found before the model is traced, and the advice works."""
    transformer = tiny.wan_pipeline().transformer
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    type(transformer)(**{**config, "ffn_dim": 67}).save_pretrained(model / "transformer")
    options = (*SMALL, "--set", "reconstruct.epochs=0", "--recipe", recipe)
    if recipe == "hadamard":
        options = ("--recipe", recipe)
    for last in (("-o", tmp_path / "out"), ("--dry-run",)):
        message = refuses("compress", model, *last, *options)
        assert "67" in message and "[blocks.0.ffn.net.2]" in message
        assert not (tmp_path / "out.work").exists()
    advice = message.partition("--set '")[2].partition("'")[0]
    assert cli(*compress(model, tmp_path, *options, "--set", advice)).code == 0


def test_text_that_is_not_finite(refuses, model, tmp_path):
    file = model / "text_encoder" / "model.safetensors"
    save_file({k: v * float("nan") for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    assert "not finite" in refuses(*compress(model, tmp_path, *SMALL))
    assert "not finite" in refuses("generate", model, "a dog", "-o", tmp_path / "x.mp4")


def test_pipelines_whose_steps_cannot_be_followed(refuses, cli, tmp_path):
    """An unconditional U-Net: there is no prompt to trace, but a recipe that needs no data compresses it."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    sizes = dict(block_out_channels=(8, 8), norm_num_groups=2, sample_size=8, layers_per_block=1)
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    DDPMPipeline(UNet2DModel(**sizes, **blocks), DDPMScheduler()).save_pretrained(tmp_path / "model")
    model = tmp_path / "model"
    assert "steps cannot be followed [DDPMPipeline]" in refuses(*compress(model, tmp_path))
    own = ("--workspace", tmp_path / "own")  # the refused job has claimed the usual one
    assert cli(*compress(model, tmp_path, "--recipe", "rtn", *own)).code == 0
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert packed_layers(pipe.unet)


class NoLinears(nn.Module):
    _no_split_modules = ("Conv2d",)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.config = {}


def test_transformers_without_linears():
    pipe = tiny.wan_pipeline()
    pipe.transformer = NoLinears()
    with pytest.raises(AttarError, match="hold no linear layers"):
        attar.compress(pipe, "rtn")


def test_a_compressed_model_is_not_compressed_again(refuses, small, tmp_path):
    message = refuses(*compress(small, tmp_path, *SHORT))
    assert "already compressed" in message


# -------------------------------------------------------------------------------------- compressed model


def test_a_tampered_checkpoint(refuses, small, tmp_path):
    file = small / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    message = refuses("generate", small, "a dog", "-o", tmp_path / "x.mp4")
    assert "checksum mismatch" in message and "download it again" in message


@pytest.mark.parametrize(
    "file", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
)
def test_tampered_copies(refuses, small, tmp_path, file):
    """Components that were not compressed have no checksums of their own; compression.json has them."""
    content = bytearray((small / file).read_bytes())
    content[-5] ^= 1
    (small / file).write_bytes(content)
    message = refuses("generate", small, "a dog", "-o", tmp_path / "x.mp4")
    assert f"the file is not as attar copied it [{file}]" in message
    (small / file).unlink()
    with pytest.raises(AttarError, match="a file is missing"):
        attar.verify_folder(small)


def test_a_checkpoint_of_a_newer_format(refuses, small, tmp_path):
    file = small / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 99
    file.write_text(json.dumps(config))
    message = refuses("generate", small, "a dog", "-o", tmp_path / "x.mp4")
    assert "format version 99" in message and "Update attar" in message


def test_damaged_evidence(refuses, wan_folder, small, tmp_path):
    for text in ("{", "[]", '{"components": {}}'):
        (small / "compression.json").write_text(text)
        message = refuses("compare", wan_folder, small, "-n", "1", "--steps", "1", "-o", tmp_path / "report")
        assert "compression.json is damaged" in message


# ----------------------------------------------------------------------------------------------- prompts


def test_prompts_files(refuses, wan_folder, tmp_path):
    file = tmp_path / "prompts.txt"
    message = refuses(*compress(wan_folder, tmp_path, "--prompts", file))
    assert "no such prompts file" in message
    for content in (b"", b"\n \n\t\n"):
        file.write_bytes(content)
        assert "the prompts file is empty" in refuses(*compress(wan_folder, tmp_path, "--prompts", file))
    for content in (b"\x89PNG\r\n\x1a\n", b"\xff\xfea\x00", bytes(range(256)), b"a dog\x00\n"):
        file.write_bytes(content)
        assert "text" in refuses(*compress(wan_folder, tmp_path, "--prompts", file))
    assert "no such prompts file" in refuses(*compress(wan_folder, tmp_path, "--prompts", tmp_path))


def test_a_pool_that_is_too_small(refuses, wan_folder, tmp_path):
    message = refuses(*compress(wan_folder, tmp_path, *SMALL, "--set", "select.count=7"))
    assert "2 prompts of 3 steps give fewer candidates than select.count = 7" in message
    message = refuses(*compress(wan_folder, tmp_path, *SMALL, "--set", "trace.prompts=4"))
    assert "traces 4 prompts, the model brings 3" in message
    message = refuses(
        *compress(wan_folder, tmp_path, *SMALL, "--set", "select.cap_per_step=1", "--set", "select.count=4")
    )
    assert "finds 3 of 4 samples" in message
    with pytest.raises(AttarError, match="no prompts were given"):
        attar.compress(pipelines.make("wan"), "s2q-vdit", prompts=[])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"height": 15, "num_inference_steps": 3}', "the pipeline rejects its arguments"),
        ('{"heigth": 16}', "unknown key 'heigth'"),
        ('{"height": "16"}', "height cannot be '16'"),
        ('{"height": 0}', "height cannot be 0"),
        ('{"height": true}', "height cannot be True"),
        ('{"fps": 0}', "fps cannot be 0"),
        ('{"guidance_scale": NaN}', "guidance_scale cannot be nan"),
        ("[1]", "is no mapping"),
        ("{", "not valid JSON"),
        ("\udcff", "not valid JSON"),
    ],
)
def test_generation_settings(refuses, model, tmp_path, content, says):
    (model / "generation.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert says in refuses(*compress(model, tmp_path, *SMALL, "--set", "trace.steps=3"))
    assert says in refuses("compress", model, "--dry-run", *SMALL, "--set", "trace.steps=3")
    assert says in refuses("generate", model, "a dog", "-o", tmp_path / "x.mp4")


# ------------------------------------------------------------------------------------- output, workspace


def test_outputs_that_are_taken(refuses, cli, wan_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("dear")
    assert "is not empty" in refuses(*compress(wan_folder, tmp_path, *SHORT))
    assert "something else than a compressed model" in refuses(
        *compress(wan_folder, tmp_path, *SHORT, "--overwrite")
    )
    assert (out / "thesis.txt").read_text() == "dear"
    assert "the output is a file" in refuses("compress", wan_folder, "-o", out / "thesis.txt", *SHORT)
    assert "a file stands" in refuses("compress", wan_folder, "-o", out / "thesis.txt" / "small", *SHORT)
    for place in (tmp_path / "new", tmp_path / "new" / "work", tmp_path / ".new.attar-partial"):
        options = ("--workspace", place, *SHORT)
        assert "workspace lies in the output" in refuses(
            "compress", wan_folder, "-o", tmp_path / "new", *options
        )
    assert "not an .mp4" in refuses("generate", wan_folder, "a dog", "-o", tmp_path / "x.avi")
    assert "a file stands" in refuses("generate", wan_folder, "a dog", "-o", out / "thesis.txt" / "x.mp4")
    assert "a file stands" in refuses("compare", wan_folder, wan_folder, "-o", out / "thesis.txt" / "report")


def test_outputs_within_the_source_and_around_it(refuses, cli, model, tmp_path):
    """What is copied from a component's folder would be copied into itself, without end."""
    before = sorted(model.rglob("*"))
    for place in ("text_encoder/x", "text_encoder", "vae/a/b", "new/../vae/x", "."):
        assert "the output lies in the model" in refuses("compress", model, "-o", model / place, *SHORT)
        message = refuses(*compress(model, tmp_path, "--workspace", model / place, *SHORT))
        assert "the workspace lies in the model" in message
    (tmp_path / "compression.json").write_text("{}")
    message = refuses("compress", model, "-o", tmp_path, "--overwrite", *SHORT)
    assert "the output lies around the model" in message
    (tmp_path / "link").symlink_to(model / "vae")
    message = refuses("compress", model, "-o", tmp_path / "link" / "x", *SHORT)
    assert "the output lies in the model" in message
    assert sorted(model.rglob("*")) == before


def test_paths_that_are_none(refuses, wan_folder, tmp_path):
    for message in (
        refuses("compress", wan_folder, "-o", "", *SHORT),
        refuses("compress", "", "-o", tmp_path / "out", *SHORT),
        refuses(*compress(wan_folder, tmp_path, "--workspace", "", *SHORT)),
        refuses(*compress(wan_folder, tmp_path, "--prompts", " ", *SMALL)),
        refuses("generate", wan_folder, "a dog", "-o", ""),
        refuses("compare", wan_folder, wan_folder, "-o", ""),
    ):
        assert "a path is empty" in message
    assert "around the model" in refuses("compress", wan_folder, "-o", "/", *SHORT)


def test_reports_replace_nothing_but_reports(refuses, cli, wan_folder, small, tmp_path):
    options = ("-n", "1", "--steps", "1")
    page = tmp_path / "site"
    page.mkdir()
    (page / "index.html").write_text("dear")
    for place in (page, small, small / "vae"):
        before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
        message = refuses("compare", wan_folder, small, "-o", place, *options)
        assert "holds no report of attar" in message
        assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
    report = tmp_path / "report"
    (report / "videos").mkdir(parents=True)
    (report / "videos" / "000-original.mp4").write_bytes(b"of a run that was stopped")
    for _ in range(2):
        assert cli("compare", wan_folder, small, "-o", report, *options).code == 0
    (report / "report.json").write_text("{}")
    assert "holds no report of attar" in refuses("compare", wan_folder, small, "-o", report, *options)


def test_a_link_as_output(cli, wan_folder, tmp_path):
    """What it points to is written; the link stays."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
        assert cli("compress", wan_folder, "-o", tmp_path / f"to-{name}", *SHORT).code == 0
        assert (tmp_path / f"to-{name}").is_symlink() and (tmp_path / name / "model_index.json").is_file()


def test_sizes_beyond_the_model(refuses, wan_folder, tmp_path):
    """The model itself fails on them, deep inside."""
    message = refuses(*compress(wan_folder, tmp_path, *SMALL, "--height", "100000"))
    assert "rejects its arguments" in message and "[WanPipeline]" in message


def test_settings_that_end_in_nothing(refuses, wan_folder, tmp_path):
    message = refuses(*compress(wan_folder, tmp_path, *SMALL, "--set", "rounding.damping=1e300"))
    assert "Hessian" in message and "[blocks.0.attn1.to_q]" in message


def test_the_current_folder_as_output(cli, wan_folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli("compress", wan_folder, "-o", ".", *SHORT).code == 0
    assert (tmp_path / "here" / "model_index.json").is_file() and (tmp_path / "here.work").is_dir()


def test_workspaces_that_are_taken(refuses, cli, wan_folder, tmp_path):
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    (home / "sub" / ".mine.tmp").write_text("dear")
    options = ("--workspace", home)
    assert "holds no attar job" in refuses(*compress(wan_folder, tmp_path, *SHORT, *options))
    assert [p.name for p in home.rglob("*")] == ["sub", ".mine.tmp"]
    assert "the workspace is a file" in refuses(
        *compress(wan_folder, tmp_path, *SHORT, "--workspace", home / "sub" / ".mine.tmp")
    )
    assert (
        cli("compress", wan_folder, "-o", tmp_path / "first", "--workspace", tmp_path / "work", *SHORT).code
        == 0
    )
    for other in (("--weights", "3"), ("--seed", "1"), ("--recipe", "rtn")):
        message = refuses(*compress(wan_folder, tmp_path, *SHORT, "--workspace", tmp_path / "work", *other))
        assert "another job" in message and ("seed" if other[0] == "--seed" else "recipe") in message
    (tmp_path / "work" / "job.json").write_text("{")
    message = refuses(*compress(wan_folder, tmp_path, *SHORT, "--workspace", tmp_path / "work"))
    assert "the file is damaged" in message and "job.json" in message


# ------------------------------------------------------------------------------------------------- disks


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow(but=["0"])
@pytest.mark.parametrize("after", range(10))
def test_a_write_fails(cli, wan_folder, tmp_path, monkeypatch, after):
    """The disk is full when the file after `after` others is put in its place; then there is space again."""
    replace, count = os.replace, 0

    def counted(*args):
        nonlocal count
        count += 1
        return full() if count > after else replace(*args)

    monkeypatch.setattr(os, "replace", counted)
    result = cli(*compress(wan_folder, tmp_path, *SMALL))
    monkeypatch.setattr(os, "replace", replace)
    assert "the disk is full" in result.message and "it goes on" in result.message
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith((".tmp", "-partial", "-former"))]
    if after in (0, 5, 9):
        assert cli(*compress(wan_folder, tmp_path, *SMALL)).code == 0


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk of its own; skipped where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str, *options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", place],
            capture_output=True,
        )
        if done.returncode:
            pytest.skip("disks cannot be mounted here")
        return place

    if shutil.which("mount") is None:
        pytest.skip("disks cannot be mounted here")
    yield mount
    subprocess.run(["umount", place], capture_output=True)


@pytest.mark.slow(but=["32k"])
@pytest.mark.parametrize("size", ["32k", "128k", "256k"])
def test_a_disk_that_is_really_full(cli, wan_folder, disk, size):
    place = disk(size)
    for options in (("-o", place / "out"), ("-o", place / "out", "--workspace", place.parent / "work")):
        result = cli("compress", wan_folder, *options, *SMALL)
        assert "the disk is full" in result.message, result.err
        assert not (place / "out").exists()
        assert not [p for p in place.rglob("*") if p.name.endswith((".tmp", "-partial"))]


@pytest.mark.parametrize("free", [0, 4, 20])
def test_videos_on_a_full_disk(cli, wan_folder, disk, free):
    """Full before the first byte, or while the encoder writes: a video is whole, or there is none."""
    place = disk("64k")
    (place / "fill").write_bytes(b"x" * (64 - free) * 1024)
    result = cli("generate", wan_folder, "a dog", "-o", place / "x.mp4", "--steps", "1")
    assert "the disk is full" in result.message and "x.mp4" in result.message
    assert [p.name for p in place.iterdir()] == ["fill"]


def test_places_that_cannot_be_written(cli, wan_folder, disk, tmp_path):
    place = disk("1m", "ro")
    assert "cannot be written" in cli("compress", wan_folder, "-o", place / "out", *SHORT).message
    options = ("--workspace", place / "work")
    assert (
        "cannot be written" in cli("compress", wan_folder, "-o", tmp_path / "out", *options, *SHORT).message
    )
    assert "cannot be written" in cli("generate", wan_folder, "a dog", "-o", place / "x.mp4").message
    assert "cannot be written" in cli("compare", wan_folder, wan_folder, "-o", place / "report").message


def test_a_mount_point_is_no_output(cli, wan_folder, disk):
    place = disk("1m")
    assert "is a mount point" in cli("compress", wan_folder, "-o", place, *SHORT).message


# ------------------------------------------------------------------------------------------ real process


def test_the_real_command(wan_folder, tmp_path):
    def run(*args: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "attar", *map(str, args)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = run(*compress(wan_folder, tmp_path, "--weights", "9"))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: quantize.weights = 9: choose between 2 and 8 bits [attar]\n"


@pytest.mark.slow
def test_the_real_command_without_a_model(tmp_path):
    command = [sys.executable, "-m", "attar", "generate", str(tmp_path), "a dog"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "model_index.json is missing" in done.stderr


def test_interruption(cli, wan_folder, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("attar.conductor.run", stop)
    result = cli(*compress(wan_folder, tmp_path, *SHORT))
    assert result.code == 130 and "run the same command again" in result.err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "or fewer frames, lower select.count, or add --stream"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "--device cpu, or take a smaller size or fewer frames, or add",
        ),
    ],
)
def test_out_of_memory(error, says, cli, wan_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("attar.conductor.run", fail)
    message = cli(*compress(wan_folder, tmp_path, *SHORT)).message
    assert "out of memory" in message and says in message


def test_a_gpu_that_is_too_small_for_a_video(cli, wan_folder, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("attar.models.source.load_pipeline", fail)
    assert "or add --offload model" in cli("generate", wan_folder, "a red 3").message


def test_a_bench_that_needs_too_much(cli, wan_folder):
    assert "lower --tokens" in cli("bench", wan_folder, "--recipe", "rtn", "--tokens", 99999999999).message
    assert "processors here" in cli("bench", wan_folder, "--threads", 100000).message
    assert cli("bench", wan_folder, "--text-tokens", 10**24).code == 2


def test_bits_for_a_folder_that_has_its_own(cli, commands, wan_folder, tmp_path):
    assert commands.run("compress", wan_folder, "-o", tmp_path / "small", "--recipe", "rtn") == 0
    for option in (("--recipe", "rtn"), ("--weights", "8"), ("--set", "quantize.scale=true")):
        assert "bits of its own" in cli("bench", tmp_path / "small", *option).message
