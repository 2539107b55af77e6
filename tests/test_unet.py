"""U-Net pipelines from command to image: compressed, saved, loaded, streamed and resumed."""

import json
from unittest import mock

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from support import unets
from support.commands import contents

import attar
from attar.errors import AttarError
from attar.evaluate.size import model_size
from attar.models.adapter import ModelAdapter
from attar.runtime.layers import packed_layers
from attar.runtime.patches import PatchLinear, SplitLinear

FEW = ("--set", "trace.prompts=1", "--set", "select.count=2")
RUNS = {
    "nearest": (
        "sd",
        ("--recipe", "rtn", "--set", "quantize.roles={head: {weights: 8}, transformer.*: {weights: 8}}"),
    ),
    "scales, split": (
        "sd",
        (
            *("--recipe", "smoothquant", *FEW, "--set", "quantize.split=true"),
            *("--set", "quantize.shift=true", "--set", "quantize.act_format=full_range"),
        ),
    ),
    "learned": (
        "sdxl",
        (
            *("--recipe", "attar-ptq", *FEW, "--set", "reconstruct.epochs=1"),
            *("--set", "reconstruct.loss=token_weighted"),
        ),
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Pipelines in folders, the U-Nets in bfloat16, that of "sd" in shards."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for name in unets.PIPELINES:
        pipe = unets.make(name)
        pipe.unet.to(torch.bfloat16)
        made[name] = unets.save(root / name, pipe=pipe)
    (made["sd"] / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipe = unets.make("sd")
    pipe.unet.to(torch.bfloat16).save_pretrained(made["sd"] / "unet", max_shard_size="60KB")
    return made


@pytest.fixture(scope="module")
def whole(commands, models, tmp_path_factory):
    """The checkpoint of an uninterrupted run in memory, made once for each kind."""
    made = {}

    def of(kind):
        if kind not in made:
            model, options = RUNS[kind]
            made[kind] = tmp_path_factory.mktemp("whole") / "small"
            arguments = ("compress", models[model], "-o", made[kind], "--no-stream", *options)
            assert commands.run(*arguments) == 0
        return made[kind]

    return of


@pytest.mark.slow(but=["nearest"])
@pytest.mark.parametrize("kind", RUNS)
def test_saved_and_loaded(kind, models, whole):
    """The loaded model is the one that was made, bit for bit, by diffusers' loader and by attar's."""
    folder = whole(kind)
    config = json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == (5 if kind == "scales, split" else 3)
    assert ("splits" in config) == (kind == "scales, split")
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    layers = packed_layers(pipe.unet)
    adapter = ModelAdapter.of(unets.PIPELINES[RUNS[kind][0]]().unet)
    shifted = [layer for layer in layers.values() if any(t.kind == "channel_shift" for t in layer.transforms)]
    assert bool(shifted) == (kind == "scales, split") and all(layer.bias is not None for layer in shifted)
    inside = {x.name for block in adapter.blocks for x in adapter.linears(block)}
    merged = {name.rpartition(".parts.")[0] or name for name in layers}
    assert inside <= merged
    if kind == "nearest":
        assert merged - inside == {x.name for x in adapter.outside_linears() if x.role in
                                   ("head", "transformer.in", "transformer.out")}  # fmt: skip
    patches = [m for m in pipe.unet.modules() if isinstance(m, PatchLinear)]
    assert patches and all(m.weight.shape[1:] == (m.in_channels, *m.kernel_size) for m in patches)
    assert any(isinstance(m, SplitLinear) for m in pipe.unet.modules()) == (kind == "scales, split")
    out = unets.generate(pipe)
    assert bool(torch.isfinite(out).all()) and torch.equal(unets.generate(attar.load(str(folder))), out)
    assert attar.verify_folder(folder) == [folder / "unet"]


@pytest.mark.slow(but=["nearest"])
@pytest.mark.parametrize("kind", ["nearest", "scales, split"])
def test_streamed_and_in_memory_give_the_same_bytes(kind, commands, models, whole, tmp_path):
    model, options = RUNS[kind]
    assert commands.run("compress", models[model], "-o", tmp_path / "small", "--stream", *options) == 0
    assert contents(tmp_path / "small") == contents(whole(kind))


@pytest.mark.slow
def test_killed_and_resumed(commands, models, whole, tmp_path):
    """Killed when inputs have been put aside, and between units."""
    model, options = RUNS["scales, split"]
    codes = [
        commands.run("compress", models[model], "-o", tmp_path / "small", *options, writes=writes)
        for writes in (2, 12, None)
    ]
    assert codes == [-9, -9, 0] and contents(tmp_path / "small") == contents(whole("scales, split"))
    assert not [name for name in contents(tmp_path / "small.work") if "waiting" in name]


TRAINED = {
    "mpq-dm": {"trace.prompts": 1, "finetune.steps": 3},
    "attar-ptq": {
        "trace.prompts": 1, "select.count": 2, "reconstruct.epochs": 1,
        "finetune": "{steps: 3, batch_size: 1, scale_lr: 1e-2}",
    },
}  # fmt: skip


@pytest.mark.slow(but=["mpq-dm"])
@pytest.mark.parametrize("recipe", TRAINED)
def test_trained_whole_and_saved(recipe, commands, models, tmp_path):
    """Units run in another order than they stand in; what is saved is what was trained, under the right names."""
    options = [part for key, value in TRAINED[recipe].items() for part in ("--set", f"{key}={value}")]
    out = tmp_path / "small"
    assert commands.run("compress", models["sd"], "-o", out, "--recipe", recipe, "--no-stream", *options) == 0
    overrides = {key: yaml.safe_load(str(value)) for key, value in TRAINED[recipe].items()}
    again = attar.compress(str(models["sd"]), recipe, overrides=overrides).unet.state_dict()
    saved = DiffusionPipeline.from_pretrained(out).unet.state_dict()
    assert saved.keys() == again.keys() and all(torch.equal(t, again[k].to(t)) for k, t in saved.items())


def test_compared_with_its_original(cli, models, whole, tmp_path):
    (tmp_path / "prompts.txt").write_text(unets.PROMPTS[0])
    options = ("-o", tmp_path / "report", "--prompts", tmp_path / "prompts.txt", "--steps", 2)
    done = cli("compare", models["sd"], whole("nearest"), *options)
    assert done.code == 0, done.err + done.message
    assert (tmp_path / "report" / "index.html").is_file() and "PSNR" in done.out


@pytest.mark.parametrize("kind", ["nearest", "scales, split"])
def test_the_dry_run_comes_true(kind, cli, models, whole):
    model, options = RUNS[kind]
    done = cli("compress", models[model], "--dry-run", "--json", *options)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    files = model_size(whole(kind))["unet"]
    assert files == result["bytes"]["checkpoint"]
    rows = {row["name"]: row for row in result["layers"]}
    assert rows["conv_in.linear"]["bits"] == "kept"
    assert rows["mid_block.resnets.0.conv1.linear"]["role"] == "resnet.conv1"
    assert rows["mid_block.resnets.0.time_emb_proj"]["acts"] is None


def test_the_dry_run_measures_units(cli, models):
    """Of every kind one, with its convolutions opened; here two are left."""
    skipped = ("down_blocks.*", "up_blocks.*", "mid_block.resnets.1.*")
    roles = ", ".join(f"{pattern}: {{skip: true}}" for pattern in skipped)
    options = ("--recipe", "attar-ptq", *FEW, "--set", f"quantize.roles={{{roles}}}")
    done = cli("compress", models["sd"], "--dry-run", "--json", *options)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["seconds"] > result["trace_seconds"]
    assert "unet.mid_block.resnets.0" in result["measured_on"] and "resnets.1 (" not in result["measured_on"]


def test_learned_units_are_better_than_they_start(whole):
    """Units that give another shape than they get have errors too, relative to all that they give."""
    evidence = json.loads((whole("learned") / "compression.json").read_text())["components"]["unet"]
    blocks = {b["block"]: b for b in evidence["blocks"]}
    assert list(blocks)[:2] == ["down_blocks.0.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0"]
    assert all(0 < b["error_after"] < b["error_before"] < 1 for b in blocks.values())
    weighted = {name for name, b in blocks.items() if b["attention"] is not None}
    assert weighted == {name for name in blocks if "transformer_blocks" in name}


def test_what_is_out_of_reach(cli, models):
    assert "the model is a U-Net" in cli("plan", models["sd"], "--gpu", "cpu").message
    options = {"trace.prompts": 1, "select.count": 2, "reconstruct.temporal_weight": 1.0}
    with pytest.raises(AttarError, match="makes images"):
        attar.compress(str(models["sd"]), "attar-ptq", overrides=options)
    trace = mock.patch("attar.conductor._trace", side_effect=AssertionError("traced for nothing"))
    for change in ({}, {"reconstruct.temporal_weight": 0, "quantize.low_rank.gate": "trained"}):
        with trace, pytest.raises(AttarError, match=r"makes images|images are no video"):
            attar.compress(str(models["sd"]), "q-vdit", overrides={**options, **change})
    done = cli("compress", models["sd"], "--recipe", "q-vdit", "--dry-run", *FEW)
    assert "makes images" in done.message
