"""Save, load, verify: bit-exact round trips, and one clear error for each way a checkpoint can be wrong."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import attar  # noqa: F401 - registers the loader
from attar.errors import AttarError
from attar.runtime import packed_layers, quantization_config_of, replace_linears, verify_folder
from attar.runtime.diffusers_integration import mark_compressed, save_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(folder, **kwargs):
    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", **kwargs)


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def read_config(folder):
    return json.loads((folder / "transformer" / "config.json").read_text())


def test_round_trip_is_bit_exact(saved, packed_wan, call, expected, tmp_path):
    model, info = load(saved, output_loading_info=True)
    assert not any(info.values())
    assert_same_state(packed_wan.state_dict(), model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(**call)[0], expected, rtol=0, atol=1e-5)

    model.save_pretrained(tmp_path / "transformer")
    verify_folder(tmp_path)
    first, second = (load_file(f / "transformer" / WEIGHTS) for f in (saved, tmp_path))
    assert_same_state(first, second)
    one, two = read_config(saved), read_config(tmp_path)
    two.pop("_name_or_path")  # written by diffusers for every loaded model
    assert one == two


def test_sharded_round_trip(saved, packed_wan, tmp_path):
    load(saved).save_pretrained(tmp_path / "transformer", max_shard_size="40KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    assert verify_folder(tmp_path) == [tmp_path / "transformer"]
    assert_same_state(packed_wan.state_dict(), load(tmp_path).state_dict())


def test_bfloat16_load_keeps_scales_and_transforms(saved, packed_wan, call, tmp_path):
    model = load(saved, torch_dtype=torch.bfloat16)
    for name, layer in packed_layers(model).items():
        original = packed_wan.get_submodule(name)
        assert layer.bias.dtype == layer.compute_dtype == layer.weight.dtype == torch.bfloat16
        for key, buffer in original.named_buffers():
            loaded = layer.get_buffer(key)
            assert loaded.dtype == buffer.dtype and torch.equal(loaded, buffer), f"{name}.{key}"
    assert model.blocks[0].norm2.weight.dtype == torch.float32  # as in the full-precision model
    with torch.no_grad():
        bf16 = {
            k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()
        }
        assert torch.isfinite(model(**bf16)[0]).all()
    model.save_pretrained(tmp_path / "transformer")
    assert_same_state(model.state_dict(), load(tmp_path, torch_dtype=torch.bfloat16).state_dict())


def test_loaded_tensors_are_aligned(saved):
    """Tensors mapped from a file lie at odd addresses, where a matrix kernel may round otherwise than in memory."""
    model = load(saved)
    assert not [name for name, tensor in model.state_dict().items() if tensor.data_ptr() % 64]


def test_float_weights_are_never_materialised(saved, monkeypatch):
    from attar.runtime import diffusers_integration

    seen = []
    original = diffusers_integration.replace_linears

    def spy(model, config):
        seen.extend(p.device.type for p in model.parameters())
        return original(model, config)

    monkeypatch.setattr(diffusers_integration, "replace_linears", spy)
    load(saved)
    assert set(seen) == {"meta"}


def test_pipeline_round_trip(packed_wan, saved, tmp_path):
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=load(saved),
    )
    pipe.save_pretrained(tmp_path)
    assert verify_folder(tmp_path) == [tmp_path / "transformer"]
    none = {"tokenizer": None, "text_encoder": None, "vae": None}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **none)
    assert_same_state(packed_wan.state_dict(), loaded.transformer.state_dict())
    half = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, **none)
    loaded.to(torch.bfloat16)
    for pipe in (half, loaded):
        layer = pipe.transformer.blocks[0].ffn.net[2]
        assert (layer.bias.dtype, layer.weight_scale.dtype) == (torch.bfloat16, torch.float32)


def test_config_says_what_is_needed_and_no_more(saved):
    config = read_config(saved)
    ours = config["quantization_config"]
    assert ours["quant_method"] == "attar" and ours["format_version"] == 1 and ours["recipe"] == "test"
    assert ours["layers"]["blocks.0.ffn.net.2"] != ours["layers"]["blocks.0.attn1.to_q"]
    assert "proj_out" in ours["modules_to_not_convert"]
    assert len(ours["schemes"]) == 4  # attention, output, and the feed-forward at two widths
    assert "_name_or_path" not in config and str(saved) not in json.dumps(config)


def test_save_replaces_the_folder_whole(saved, tmp_path):
    model = load(saved)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "stale.txt").write_text("x")
    save_transformer(model, folder)
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS]
    assert os.listdir(tmp_path) == ["out"]
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["recipe"] == "test"


def test_pickled_weights_are_refused(saved, packed_wan, tmp_path):
    """diffusers would write a file that cannot be loaded, and remove those that can."""
    model = load(saved)
    model.save_pretrained(tmp_path / "transformer")
    with pytest.raises(AttarError, match="safetensors only"):
        model.save_pretrained(tmp_path / "transformer", safe_serialization=False)
    assert sorted(os.listdir(tmp_path / "transformer")) == ["config.json", WEIGHTS]
    verify_folder(tmp_path)
    assert_same_state(packed_wan.state_dict(), load(tmp_path).state_dict())


def test_unpacked_model_has_no_config(call):
    with pytest.raises(AttarError, match="no packed layer"):
        quantization_config_of(torch.nn.Linear(2, 2))


def test_mark_compressed_lets_plain_save_work(packed_wan, tmp_path):
    mark_compressed(packed_wan, "test").save_pretrained(tmp_path / "transformer")
    verify_folder(tmp_path)
    assert_same_state(packed_wan.state_dict(), load(tmp_path).state_dict())


def edit_config(change):
    def apply(folder):
        path = folder / "transformer" / "config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"], config)
        path.write_text(json.dumps(config))

    return apply


def edit_bytes(change):
    def apply(folder):
        path = folder / "transformer" / WEIGHTS
        data = bytearray(path.read_bytes())
        path.write_bytes(bytes(change(data)))

    return apply


def flip(data):
    data[-1000] ^= 1
    return data


def scheme(**fields):
    return edit_config(lambda ours, _: ours["schemes"][1].update(fields))


# name -> (damage, what verify_folder says (None: it cannot know), what from_pretrained says)
DAMAGE = {
    "tampered": (edit_bytes(flip), "checksum mismatch", "checksum mismatch"),
    "newer": (
        edit_config(lambda o, _: o.update(format_version=99)),
        "format version 99",
        "format version 99",
    ),
    "no version": (edit_config(lambda o, _: o.pop("format_version")), "format_version", "format_version"),
    "version true": (edit_config(lambda o, _: o.update(format_version=True)), "is True", "is True"),
    "unknown field": (edit_config(lambda o, _: o.update(warp=1)), "unknown field 'warp'", "unknown field"),
    "scheme index": (
        edit_config(lambda o, _: o["layers"].update({"blocks.0.attn1.to_q": 9})),
        "not listed",
        "not listed",
    ),
    "scheme field": (scheme(warp=1), "scheme 1", "scheme 1"),
    "transform kind": (
        scheme(transforms=[{"kind": "warp"}]),
        "unknown transform 'warp'",
        "unknown transform",
    ),
    "transform of another type": (
        scheme(transforms=["channel_shift"]),
        "transform 'channel_shift'",
        "transform",
    ),
    "bits": (scheme(weight_bits=9), "9-bit", "9-bit"),
    "bits type": (scheme(weight_bits="4"), "scheme 1", "scheme 1"),
    "other bits": (scheme(weight_bits=7), "not the one", "not the one"),
    "other activation bits": (scheme(act_bits=2), "not the one", "not the one"),
    "no transforms": (scheme(transforms=[]), "has no tensor 'transforms", "has no tensor 'transforms"),
    "another rotation": (
        edit_config(lambda o, _: o["schemes"][1]["transforms"].reverse()),
        "not the one",
        "not the one",
    ),
    "unknown layer": (
        edit_config(lambda o, _: o["layers"].update({"blocks.9.attn1.to_q": 0})),
        "is missing",
        "is missing",
    ),
    "not a linear": (
        edit_config(lambda o, _: o["layers"].update({"blocks.0.norm2": 0})),
        "is missing",
        "is missing",
    ),
    "unlisted layer": (
        edit_config(lambda o, _: o["layers"].pop("blocks.0.attn1.to_q")),
        "does not list it",
        "does not list it",
    ),
    "fewer blocks": (edit_config(lambda _, c: c.update(num_layers=1)), None, "has no layer 'blocks.1"),
    "other width": (edit_config(lambda _, c: c.update(ffn_dim=128)), None, "ffn"),
}


@pytest.mark.parametrize("damage, verify_says, load_says", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_reported(saved, tmp_path, damage, verify_says, load_says):
    folder = shutil.copytree(saved, tmp_path / "damaged")
    damage(folder)
    if verify_says is not None:
        with pytest.raises(AttarError, match=verify_says) as caught:
            verify_folder(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(AttarError, match=load_says) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]})
    )
    with pytest.raises(AttarError, match=load_says):  # a pipeline passes the error on as it is
        DiffusionPipeline.from_pretrained(
            folder, tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler()
        )


def without_config_checksum(folder):
    """The checkpoint as attar 0.1 wrote it at first."""
    path = folder / "transformer" / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "attar_config_sha256"}
    save_file(load_file(path), path, metadata)


def test_a_checkpoint_without_the_checksum_of_its_config(saved, packed_wan, tmp_path):
    """It loads, and what the tensors themselves contradict is still found; saved again, it has the checksum."""
    folder = shutil.copytree(saved, tmp_path / "old")
    without_config_checksum(folder)
    verify_folder(folder)
    model = load(folder)
    assert_same_state(packed_wan.state_dict(), model.state_dict())
    scheme(transforms=[])(folder)
    for check in (verify_folder, load):
        with pytest.raises(AttarError, match=r"has no tensor 'transforms\.0\.scale'"):
            check(folder)
    model.save_pretrained(tmp_path / "new" / "transformer", max_shard_size="40KB")
    scheme(act_bits=2)(tmp_path / "new")
    with pytest.raises(AttarError, match="not the one that the weights were saved with"):
        verify_folder(tmp_path / "new")


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_unreadable_weight_file(saved, tmp_path, damage):
    folder = shutil.copytree(saved, tmp_path / "damaged")
    path = folder / "transformer" / WEIGHTS
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -100 if damage == "truncated" else 0])
    with pytest.raises(AttarError) as caught:
        verify_folder(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        OSError, match="diffusion_pytorch_model"
    ):  # diffusers reads the file before it asks us
        load(folder)


@pytest.mark.parametrize("damage", ["truncated", "missing", "mixed"])
def test_damaged_shard(saved, tmp_path, damage):
    load(saved).save_pretrained(tmp_path / "a" / "transformer", max_shard_size="40KB")
    folder = tmp_path / "a"
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        other = load(saved)
        other.blocks[0].attn1.to_q.codes += 1
        other.save_pretrained(tmp_path / "b" / "transformer", max_shard_size="40KB")
        shutil.copy(tmp_path / "b" / "transformer" / shard.name, shard)
    with pytest.raises(AttarError):
        verify_folder(folder)
    with pytest.raises((AttarError, FileNotFoundError), match=r"\.safetensors"):
        load(folder)


def test_verify_needs_an_attar_checkpoint(tmp_path):
    with pytest.raises(AttarError, match="no such folder"):
        verify_folder(tmp_path / "nowhere")
    with pytest.raises(AttarError, match="no attar checkpoint"):
        verify_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AttarError, match="not valid JSON"):
        verify_folder(tmp_path)


@pytest.mark.parametrize("table", ['["a"]', "5", "true", '"aaa"', "null", "{", "[" * 100_000, '{"a": 1}'])
def test_a_header_without_a_table_of_checksums(saved, tmp_path, table):
    folder = shutil.copytree(saved, tmp_path / "damaged")
    path = folder / "transformer" / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), "attar_sha256": table}
    save_file(load_file(path), path, metadata)
    for check in (verify_folder, load):
        with pytest.raises(AttarError, match=r"is no table of checksums \[diffusion_pytorch_model"):
            check(folder)


TO_OUT = "blocks.0.attn1.to_out.0"
FFN = "blocks.0.ffn.net.2"


@pytest.mark.parametrize(
    ("tensor", "value", "says"),
    [
        (f"{TO_OUT}.transforms.0.scale", 0.0, "finite and positive"),
        (f"{TO_OUT}.transforms.0.scale", float("nan"), "finite and positive"),
        (f"{TO_OUT}.transforms.1.left", float("nan"), "left must be finite"),
        (f"{FFN}.transforms.1.signs", 3, "signs of a Hadamard"),
        (f"{FFN}.act_clip", float("nan"), "two finite factors"),
        (f"{FFN}.act_clip", -1.0, "two finite factors"),
    ],
)
def test_values_are_checked_where_checksums_cannot_tell(saved, tmp_path, tensor, value, says):
    folder = shutil.copytree(saved, tmp_path / "damaged")
    path = folder / "transformer" / WEIGHTS
    tensors = load_file(path)
    tensors[tensor][..., 0] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(AttarError, match=says) as caught:
        load(folder)
    assert tensor.split(".transforms")[0].removesuffix(".act_clip") in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "hadamard", "order": 0, "block": 64},
        {"kind": "hadamard", "order": -1, "block": 64},
        {"kind": "hadamard", "order": "1", "block": 64},
        {"kind": "kronecker", "left": -8, "right": -8},
        {"kind": "kronecker", "left": None, "right": 8},
        {"kind": "block_rotations", "block": 0, "stages": 1},
        {"kind": "block_rotations", "block": 8, "stages": 10**30},
    ],
)
def test_impossible_transforms_are_one_error(saved, fields):
    config = read_config(saved)
    ours = config.pop("quantization_config")
    ours["schemes"][ours["layers"][TO_OUT]]["transforms"] = [fields]
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    with pytest.raises(AttarError, match=r"blocks\.0\.attn1\.to_out") as caught:
        replace_linears(model, ours)
    assert "\n" not in str(caught.value)


def test_disk_offload_is_refused(saved, tmp_path):
    with pytest.raises(AttarError, match="offloaded to disk"):
        load(saved, device_map={"": "cpu", "blocks.0": "disk"}, offload_folder=str(tmp_path))


def test_a_loader_that_casts_scales_is_caught(saved):
    model = load(saved)
    layer = model.blocks[0].ffn.net[2]
    layer.transforms[0].scale = layer.transforms[0].scale.bfloat16()
    with pytest.raises(AttarError, match=r"transforms\.0\.scale was cast to torch\.bfloat16"):
        model.hf_quantizer.postprocess_model(model)


def test_non_finite_scales_are_refused(saved, tmp_path):
    model = load(saved)
    model.blocks[0].attn1.to_q.weight_scale[3] = float("nan")
    model.save_pretrained(tmp_path / "transformer")
    with pytest.raises(AttarError, match=r"scale is not finite.*blocks.0.attn1.to_q"):
        load(tmp_path)


def test_only_linears_are_replaced(saved):
    config = read_config(saved)["quantization_config"]
    with torch.device("meta"), pytest.raises(AttarError, match="LayerNorm, not a Linear, as 'norm'"):
        replace_linears(
            torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4)}), {**config, "layers": {"norm": 0}}
        )


def test_replace_linears_allocates_nothing(saved):
    config = read_config(saved)
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config({k: v for k, v in config.items() if k[0] != "q"})
    replace_linears(model, config["quantization_config"])
    assert set(packed_layers(model)) == set(config["quantization_config"]["layers"])
    assert all(t.is_meta for layer in packed_layers(model).values() for t in layer.state_dict().values())
