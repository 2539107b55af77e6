"""Text encoders with low-bit weights: packed, saved, loaded by transformers, the same bytes whichever way it went."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from support import pipelines
from support.commands import contents
from transformers import T5EncoderModel, UMT5EncoderModel

import attar
from attar.errors import AttarError
from attar.evaluate.size import model_size
from attar.quantize.formats import quantize_weight
from attar.recipe import load_recipe
from attar.runtime.layers import PackedLinear, packed_layers
from attar.runtime.reference import dequantize

OPTIONS = ("--recipe", "rtn", "--text-encoder-weights", "4", "--set", "text_encoder.group_size=16")
CLASSES = {"cogvideox": T5EncoderModel, "wan": UMT5EncoderModel}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Pipelines in folders; the text encoder of one is in bfloat16 and in shards."""
    root = tmp_path_factory.mktemp("models")
    made = {name: pipelines.save(root / name, name) for name in ("cogvideox", "wan", "flux")}
    pipe = pipelines.make("cogvideox")
    (made["cogvideox"] / "text_encoder" / "model.safetensors").unlink()
    pipe.text_encoder.to(torch.bfloat16).save_pretrained(
        made["cogvideox"] / "text_encoder", max_shard_size="10KB"
    )
    assert len(list((made["cogvideox"] / "text_encoder").glob("*.safetensors"))) > 1
    return made


@pytest.fixture(scope="module")
def small(commands, models, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("small")
    for name in models:
        assert commands.run("compress", models[name], "-o", root / name, "--stream", *OPTIONS) == 0
    return {name: root / name for name in models}


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_loads_it_packed(models, small, name):
    encoder = CLASSES[name].from_pretrained(small[name] / "text_encoder")
    original = CLASSES[name].from_pretrained(models[name] / "text_encoder", dtype=torch.float32)
    linears = {n for n, m in original.named_modules() if isinstance(m, torch.nn.Linear)}
    layers = packed_layers(encoder)
    assert layers.keys() == linears and len(linears) == 6 + (name == "wan")
    for path, layer in layers.items():
        assert (layer.weight_bits, layer.act_bits, layer.group_size) == (4, None, 16)
        codes, scale = quantize_weight(original.get_submodule(path).weight.detach(), 4, None, 16)
        expected = dequantize(codes.unflatten(1, (scale.shape[1], -1)), scale.unsqueeze(-1)).flatten(1)
        assert torch.equal(layer.dequantized(), expected)
    kept = set(original.state_dict()) - {f"{path}.weight" for path in linears}
    state = encoder.state_dict()
    assert all(torch.equal(state[key].float(), original.state_dict()[key]) for key in kept)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_computes_no_weight(small, name, dtype, monkeypatch):
    """transformers asks the last linear of every feed-forward for its weight's dtype."""
    encoder = CLASSES[name].from_pretrained(small[name] / "text_encoder", dtype=dtype)
    plain = copy.deepcopy(encoder)
    for module in plain.modules():
        if type(module).__module__ == "attar.runtime.t5":
            module.__class__ = next(
                c for c in type(module).__mro__ if c.__module__.startswith("transformers.")
            )
    asked = []
    read = PackedLinear.weight.fget
    monkeypatch.setattr(PackedLinear, "weight", property(lambda layer: asked.append(layer) or read(layer)))
    ids = torch.tensor([[3, 4, 5, 1]])
    with torch.no_grad():
        found = encoder(ids).last_hidden_state
        assert not asked
        assert torch.equal(plain(ids).last_hidden_state, found) and len(asked) > 0
    assert pickle.loads(pickle.dumps(encoder)).state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", CLASSES)
def test_what_transformers_keeps_in_float32_computes_in_it(models, small, name):
    """The last linear of T5's feed-forwards gives numbers that float16 does not reach."""
    folders = [folder[name] / "text_encoder" for folder in (models, small)]
    dense, packed = (CLASSES[name].from_pretrained(folder, dtype=torch.float16) for folder in folders)
    for path, layer in packed_layers(packed).items():
        assert layer.compute_dtype == dense.get_submodule(path).weight.dtype, path
    for encoder in (dense, packed):
        for path, layer in encoder.named_modules():
            if path.endswith(".wo"):
                (layer.weight_scale if isinstance(layer, PackedLinear) else layer.weight.data).mul_(3e6)
        with torch.no_grad():
            assert torch.isfinite(encoder(torch.tensor([[3, 4, 5, 1]])).last_hidden_state).all()


@pytest.mark.parametrize("name", CLASSES)
def test_saved_again_it_is_the_same(small, name, tmp_path):
    encoder = CLASSES[name].from_pretrained(small[name] / "text_encoder")
    encoder.save_pretrained(tmp_path / "text_encoder")
    before, after = (load_file(f / "text_encoder" / "model.safetensors") for f in (small[name], tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert attar.verify_folder(tmp_path / "text_encoder") == [tmp_path / "text_encoder"]
    configs = [json.loads((f / "text_encoder" / "config.json").read_text()) for f in (small[name], tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert str(tmp_path) not in json.dumps(configs[1])


@pytest.mark.parametrize("name", CLASSES)
def test_loaded_tensors_are_aligned(small, name):
    encoder = CLASSES[name].from_pretrained(small[name] / "text_encoder")
    assert not [key for key, tensor in encoder.state_dict().items() if tensor.data_ptr() % 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pipeline_runs_with_it(small, dtype):
    pipe = DiffusionPipeline.from_pretrained(small["wan"], torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    layer = pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q
    assert layer.weight_scale.dtype == torch.float32 and layer.compute_dtype == dtype
    assert len(attar.verify_folder(small["wan"])) == 2
    assert bool(torch.isfinite(pipelines.generate(pipe, "wan")).all())
    pipe.to(torch.float32)
    assert layer.weight_scale.dtype == torch.float32 and layer.compute_dtype == torch.float32


@pytest.mark.parametrize("name", ["cogvideox", "flux"])
def test_streamed_resumed_and_in_memory_give_the_same_bytes(commands, models, small, name, tmp_path):
    for turn in range(20):
        mode = "--stream" if turn % 2 else "--no-stream"
        arguments = ("compress", models[name], "-o", tmp_path / name, mode, *OPTIONS)
        if commands.run(*arguments, writes=2) == 0:
            break
    assert turn >= 2 and contents(tmp_path / name) == contents(small[name])


def test_the_interface_gives_the_same_tensors(models, small, tmp_path):
    overrides = {"text_encoder.weights": 4, "text_encoder.group_size": 16}
    pipe = attar.compress(str(models["flux"]), "rtn", overrides=overrides)
    assert packed_layers(pipe.text_encoder) and packed_layers(pipe.text_encoder_2)
    pipe.save_pretrained(tmp_path)
    for part in ("text_encoder", "text_encoder_2"):
        before, after = (load_file(f / part / "model.safetensors") for f in (small["flux"], tmp_path))
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("group", ["16", "null", "24"])
def test_the_dry_run_says_what_comes(cli, models, tmp_path, group):
    options = ("--recipe", "rtn", "--text-encoder-weights", "8", "--set", f"text_encoder.group_size={group}")
    forecast = json.loads(cli("compress", models["cogvideox"], "--dry-run", "--json", *options).out)
    rows = [row for row in forecast["layers"] if row["component"] == "text_encoder"]
    assert len(rows) == 6 and {(row["weights"], row["acts"]) for row in rows} == {(8, None)}
    assert all(("24 does not divide" in row["reason"]) == (group == "24") for row in rows)
    shown = cli("compress", models["cogvideox"], "--dry-run", *options)
    assert "W8A16" in shown.out and "text_encoder:" in shown.out
    done = cli("compress", models["cogvideox"], "-o", tmp_path / "out", "--json", *options)
    assert done.code == 0, done.err
    sizes = forecast["bytes"]["text_encoders"]["text_encoder"]
    assert sizes == [model_size(f)["text_encoder"] for f in (models["cogvideox"], tmp_path / "out")]
    assert json.loads(done.out)["text_encoder_bytes"] == {"text_encoder": sizes}
    assert "text encoder | 8-bit weights" in (tmp_path / "out" / "README.md").read_text()


def test_impossible_wishes(cli, models, small, tmp_path):
    for value in ("1", "16"):
        message = cli("compress", models["wan"], "--dry-run", "--text-encoder-weights", value).message
        assert "text_encoder.weights" in message
    assert load_recipe("rtn", {"text_encoder.weights": 4}).text_encoder.group_size == 64
    with pytest.raises(AttarError, match=r"unknown key .text_encoder\.acts"):
        load_recipe("rtn", {"text_encoder.acts": 4})
    pipe = pipelines.make("wan")
    pipe.text_encoder = None
    with pytest.raises(AttarError, match="no text encoder"):
        attar.compress(pipe, "rtn", overrides={"text_encoder.weights": 4})


@pytest.mark.parametrize("how", ["altered", "tensor gone", "not finite", "other scheme"])
def test_damage_is_found_while_loading(small, tmp_path, how):
    import shutil

    folder = shutil.copytree(small["wan"] / "text_encoder", tmp_path / "text_encoder")
    path = folder / "model.safetensors"
    if how == "altered":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif how == "other scheme":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["schemes"][0]["weight_bits"] = 8
        (folder / "config.json").write_text(json.dumps(config))
    else:
        tensors = load_file(path)
        if how == "tensor gone":
            tensors.pop("encoder.block.0.layer.0.SelfAttention.q.codes")
        else:
            tensors["encoder.block.0.layer.0.SelfAttention.q.weight_scale"][1] = float("nan")
        save_file(tensors, path, {"format": "pt"})
    said = {
        "altered": "checksum mismatch",
        "tensor gone": "is missing",
        "not finite": "is not finite, or zero",
        "other scheme": "not the one that the weights were saved with",
    }
    with pytest.raises(AttarError, match=said[how]):
        UMT5EncoderModel.from_pretrained(folder)
