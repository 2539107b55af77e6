import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from attar.errors import AttarError
from attar.evaluate.size import folder_bytes, format_bytes, model_size, module_bytes, safetensors_bytes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "vae").mkdir()
    save_file(
        {"a": torch.zeros(10, 4), "b": torch.zeros(3, dtype=torch.uint8)},
        tmp_path / "transformer/x.safetensors",
    )
    save_file({"c": torch.zeros(5)}, tmp_path / "vae/y.safetensors", metadata={"format": "pt"})
    (tmp_path / "judge").mkdir()
    save_file({"d": torch.zeros(9)}, tmp_path / "judge/z.safetensors")
    (tmp_path / "model_index.json").write_text('{"transformer": [], "vae": []}')
    return tmp_path


def test_tensors_are_counted_by_component_without_headers(folder):
    assert safetensors_bytes(folder) == {"transformer": 163, "vae": 20}
    assert model_size(folder) == model_size(str(folder)) == safetensors_bytes(folder)
    assert safetensors_bytes(folder / "vae") == {".": 20}
    (folder / "model_index.json").write_text("{")
    with pytest.raises(AttarError, match="not valid JSON"):
        model_size(folder)


def test_disk_size_counts_every_file_and_follows_links(folder, tmp_path_factory):
    sizes = folder_bytes(folder)
    assert sizes["."] == len('{"transformer": [], "vae": []}')
    assert sizes["transformer"] == (folder / "transformer/x.safetensors").stat().st_size > 163
    linked = tmp_path_factory.mktemp("linked")
    (linked / "transformer").symlink_to(folder / "transformer")
    assert folder_bytes(linked)["transformer"] == sizes["transformer"]


def test_module_counts_parameters_and_buffers_once():
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3, bias=False))
    module[1].weight = module[0].weight
    module.register_buffer("codes", torch.zeros(7, dtype=torch.uint8))
    assert module_bytes(module) == (12 + 3) * 4 + 7
    assert model_size(module) == {"model": 67}
    pipeline = types.SimpleNamespace(components={"transformer": module, "scheduler": object()})
    assert model_size(pipeline) == {"transformer": 67}


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_files_are_named(folder, keep):
    path = folder / "vae/y.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AttarError, match=r"y\.safetensors"):
        safetensors_bytes(folder)


def test_nothing_to_measure_is_said(tmp_path):
    with pytest.raises(AttarError, match="no safetensors"):
        model_size(tmp_path)
    with pytest.raises(AttarError, match="no such folder"):
        model_size(tmp_path / "absent")
    with pytest.raises(AttarError, match="cannot measure"):
        model_size(3)


def test_sizes_are_read_by_people():
    values = [0, 999, 1500, 23_456_789, 100_400_000, 2_633_000_000, 5e12]
    assert [format_bytes(v) for v in values] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "23.5 MB",
        "100 MB",
        "2.63 GB",
        "5 TB",
    ]


def test_variants_are_not_counted_and_older_files_are(folder):
    weights = {"a": torch.zeros(10, 4)}
    save_file(weights, folder / "transformer/diffusion_pytorch_model.safetensors")
    save_file(weights, folder / "transformer/diffusion_pytorch_model.fp16.safetensors")
    assert safetensors_bytes(folder) == {"transformer": 160, "vae": 20}
    (folder / "vae/y.safetensors").unlink()
    (folder / "vae/diffusion_pytorch_model.bin").write_bytes(b"x" * 77)
    assert safetensors_bytes(folder) == {"transformer": 160, "vae": 77}
