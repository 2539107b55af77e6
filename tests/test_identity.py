"""The fingerprint of a folder: of its configs and weights, whatever the files are called or split into."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import pipelines

from attar.identity import folder_fingerprint


@pytest.fixture
def folder(wan_folder, tmp_path):
    return shutil.copytree(wan_folder, tmp_path / "elsewhere")


def fingerprint(folder, dtype=torch.float32):
    return folder_fingerprint(folder, dtype)


def test_place_and_shards_are_no_part_of_it(folder, wan_folder):
    assert fingerprint(folder) == fingerprint(wan_folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    pipelines.make("wan").transformer.save_pretrained(folder / "transformer", max_shard_size="40KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    assert fingerprint(folder) == fingerprint(wan_folder)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_weight_is(folder, wan_folder, part):
    path = next((folder / part).glob("*.safetensors"))
    tensors = load_file(path)
    max(tensors.values(), key=torch.Tensor.numel).view(-1)[-1] += 1
    save_file(tensors, path, {"format": "pt"})
    assert fingerprint(folder) != fingerprint(wan_folder)


def test_configs_and_the_type_of_the_run_are(folder, wan_folder):
    assert fingerprint(folder, torch.bfloat16) != fingerprint(wan_folder)
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_diffusers_version": "0.1"}))
    assert fingerprint(folder) == fingerprint(wan_folder)
    path.write_text(json.dumps({**config, "eps": 1e-5}))
    assert fingerprint(folder) != fingerprint(wan_folder)


def test_weights_in_the_older_format_count(folder):
    path = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(path), folder / "text_encoder" / "pytorch_model.bin")
    path.unlink()
    before = fingerprint(folder)
    content = bytearray((folder / "text_encoder" / "pytorch_model.bin").read_bytes())
    content[100] ^= 1
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(content)
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    ("file", "entry"),
    [("scheduler/scheduler_config.json", {"shift": 9.0}), ("model_index.json", {"boundary_ratio": 0.5})],
)
def test_what_the_trajectory_depends_on_is(folder, wan_folder, file, entry):
    path = folder / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "_diffusers_version": "0.1"}))
    assert fingerprint(folder) == fingerprint(wan_folder)
    path.write_text(json.dumps({**content, **entry}))
    assert fingerprint(folder) != fingerprint(wan_folder)


def test_a_tokenizer_is(folder, wan_folder):
    path = next(p for p in sorted((folder / "tokenizer").iterdir()) if not p.name.endswith("config.json"))
    path.write_bytes(path.read_bytes() + b" ")
    assert fingerprint(folder) != fingerprint(wan_folder)
