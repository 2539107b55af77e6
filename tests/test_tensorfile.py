"""safetensors files, tensor by tensor: what we read is what the library wrote, and the other way round."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attar.errors import AttarError
from attar.tensorfile import DTYPES, TensorFile, TensorWriter

KINDS = st.tuples(
    st.sampled_from([dtype for name, dtype in DTYPES.items() if not name.startswith("F8")]),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
)


def tensors(kinds):
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer.{i}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for i, (dtype, shape) in enumerate(kinds)
    }


@settings(max_examples=40, deadline=None)
@given(st.lists(KINDS, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_written_in_any_order_it_is_the_file_that_safetensors_writes(tmp_path_factory, kinds, random):
    folder, content = tmp_path_factory.mktemp("files"), tensors(kinds)
    save_file(content, folder / "theirs", {"format": "pt"})
    order = list(content)
    random.shuffle(order)
    announced = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in content.items()}
    with TensorWriter(folder / "ours", announced, {"format": "--"}) as writer:
        for name in order:
            writer.write(name, content[name])
        writer.finish({"format": "pt"})
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    file = TensorFile(folder / "ours")
    for name, tensor in load_file(folder / "theirs").items():
        found = file.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_the_ends_of_a_tensor(tmp_path):
    save_file({"a": torch.arange(10, dtype=torch.uint8)}, tmp_path / "file")
    file = TensorFile(tmp_path / "file")
    assert file.ends("a", 3) == (bytes([0, 1, 2]), bytes([7, 8, 9]))
    assert file.ends("a", 30) == (bytes(range(10)),) * 2


def test_metadata_is_sorted_and_the_tensors_are_aligned(tmp_path):
    kinds = {"odd": (torch.uint8, (3,)), "wide": (torch.float64, (2,)), "half": (torch.bfloat16, (5,))}
    with TensorWriter(tmp_path / "file", kinds, {"b": "2", "a": "1"}) as writer:
        for name, (dtype, shape) in kinds.items():
            writer.write(name, torch.ones(shape, dtype=dtype))
        writer.finish({"b": "2", "a": "1"})
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"a": "1", "b": "2"}
    for entry in TensorFile(tmp_path / "file").entries.values():
        assert entry.offset % entry.dtype.itemsize == 0


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "header cut":
        path.write_bytes(content[:20])
    elif how == "no JSON":
        path.write_bytes(content[:8] + b"x" * length + content[8 + length :])
    elif how == "unknown type":
        header = json.dumps({"a": {"dtype": "Q3", "shape": [1], "data_offsets": [0, 1]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "header cut", "no JSON", "unknown type", "gone"])
def test_damaged_files_are_named(tmp_path, how):
    path = tmp_path / "transformer" / "model.safetensors"
    path.parent.mkdir()
    save_file({"a": torch.ones(4)}, path)
    damage(path, how)
    with pytest.raises(AttarError, match="damaged or incomplete") as caught:
        TensorFile(path)
    assert caught.value.where == "transformer/model.safetensors"
