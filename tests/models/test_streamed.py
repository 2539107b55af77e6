"""Pipelines whose weights stay in their folders: the same bits as in memory, with one unit of them open."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import pipelines

from attar.errors import AttarError
from attar.models import memory
from attar.models.adapter import ModelAdapter
from attar.models.components import empty_model
from attar.models.memory import choose, free_bytes, weight_bytes
from attar.models.shards import Shards
from attar.models.source import default_dtype, find_source, load_pipeline
from attar.models.streamed import not_streamable, streamed_pipeline
from attar.models.weights import weights_of

NAMES = ("wan22", "cogvideox", "hunyuan", "flux", "dit")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines in folders, with bfloat16 transformers in shards."""
    root, made = tmp_path_factory.mktemp("streamed"), {}
    for name in NAMES:
        pipe = pipelines.make(name)
        made[name] = pipelines.save(root / name, name, pipelines.CASES[name].steps, pipe=pipe)
        for part in (part for part in pipe.components if part.startswith("transformer")):
            if pipe.components[part] is None:
                continue
            (made[name] / part / "diffusion_pytorch_model.safetensors").unlink()
            pipe.components[part].to(torch.bfloat16).save_pretrained(made[name] / part, max_shard_size="40KB")
            assert len(list((made[name] / part).glob("*.safetensors"))) > 1
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_it_generates_the_same_bits(folders, name, dtype):
    source = find_source(str(folders[name]))
    whole, streamed = load_pipeline(source, dtype=dtype), streamed_pipeline(source, dtype=dtype)
    for part in (part for part in whole.components if part.startswith("transformer")):
        if whole.components[part] is not None:
            types = [
                {k: p.dtype for k, p in pipe.components[part].named_parameters()}
                for pipe in (whole, streamed)
            ]
            assert types[0] == types[1]
    assert torch.equal(pipelines.generate(whole, name), pipelines.generate(streamed, name))


def resident(model) -> set[str]:
    return {key for key, tensor in model.state_dict().items() if not tensor.is_meta}


def test_one_unit_is_open_among_all_models(folders):
    pipe = streamed_pipeline(find_source(str(folders["wan22"])))
    parts = {name: pipe.components[name] for name in ("text_encoder", "transformer", "transformer_2")}
    rest = {name: resident(part) for name, part in parts.items()}
    assert not any(key.startswith("blocks.") for key in rest["transformer"])
    open_units, most = set(), 0

    def look(module, args):
        nonlocal most
        units = {
            (name, ".".join(key.split(".")[: 3 if name == "text_encoder" else 2]))
            for name, part in parts.items()
            for key in resident(part) - rest[name]
        }
        open_units.update(units)
        most = max(most, len(units))

    for part in parts.values():
        for unit in weights_of(part).units.values():
            unit.register_forward_pre_hook(look)
    pipelines.generate(pipe, "wan22")
    assert most == 1 and {name for name, _ in open_units} == set(parts)
    assert all(tensor.is_meta for tensor in pipe.vae.parameters())


def test_opened_blocks_hold_what_is_stored(folders):
    folder = folders["cogvideox"]
    transformer = streamed_pipeline(find_source(str(folder))).transformer
    shards, weights = Shards(folder / "transformer"), weights_of(transformer)
    for block in ModelAdapter.of(transformer).blocks:
        with weights.opened(block.module):
            for key, tensor in block.module.state_dict().items():
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, shards.read(f"{block.name}.{key}").float())
    assert {key for key, _ in weights.tensors()} == {key for key, _ in transformer.named_parameters()}


def test_tied_embeddings_are_found_under_the_stored_name(folders):
    encoder = streamed_pipeline(find_source(str(folders["wan22"]))).text_encoder
    whole = load_pipeline(find_source(str(folders["wan22"]))).text_encoder
    ids = torch.tensor([[3, 4, 1]])
    with torch.no_grad():
        assert torch.equal(encoder(ids).last_hidden_state, whole(ids).last_hidden_state)


def broken(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


def test_what_cannot_be_streamed_is_said(folders, tmp_path):
    assert not_streamable(find_source(str(folders["cogvideox"]))) is None
    copy = broken(folders["cogvideox"], tmp_path)
    index = json.loads((copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    key = "transformer_blocks.1.attn1.to_q.weight"
    path = copy / "transformer" / index["weight_map"][key]
    content = load_file(path)
    content["transformer_blocks.1.attn1.query.weight"] = content.pop(key)
    save_file(content, path, {"format": "pt"})
    assert "no tensor 'transformer_blocks.1.attn1.to_q.weight'" in (
        not_streamable(find_source(str(copy))) or ""
    )
    with pytest.raises(AttarError, match="cannot be streamed"):
        streamed_pipeline(find_source(str(copy)))
    for file in (copy / "transformer").glob("*.safetensors*"):
        file.unlink()
    assert not_streamable(find_source(str(copy))) == "transformer has no safetensors file"


def test_a_text_encoder_with_other_names_is_loaded_whole(folders, tmp_path):
    copy = broken(folders["cogvideox"], tmp_path)
    path = copy / "text_encoder" / "model.safetensors"
    content = load_file(path)
    assert "shared.weight" in content
    content["encoder.embed_tokens.weight"] = content.pop("shared.weight")  # tied to the one that is not there
    save_file(content, path, {"format": "pt"})
    pipe = streamed_pipeline(find_source(str(copy)))
    expected = pipelines.generate(streamed_pipeline(find_source(str(folders["cogvideox"]))), "cogvideox")
    assert torch.equal(pipelines.generate(pipe, "cogvideox"), expected)
    prefix = pipe.text_encoder.base_model_prefix  # transformers takes names with it and without
    save_file({f"{prefix}.{key}": value for key, value in content.items()}, path, {"format": "pt"})
    whole = streamed_pipeline(find_source(str(copy))).text_encoder
    assert not hasattr(whole, "attar_weights")
    assert torch.equal(whole.state_dict()["shared.weight"], content["encoder.embed_tokens.weight"])
    save_file({f"t5.{key}": value for key, value in content.items()}, path, {"format": "pt"})
    with pytest.raises(AttarError, match=r"is missing from the weight files \[text_encoder\]"):
        streamed_pipeline(find_source(str(copy)))  # transformers would fill it with random numbers


def test_the_choice(folders, monkeypatch):
    source = find_source(str(folders["cogvideox"]))
    assert choose(source, False, None, "cpu", None).streamed
    assert not choose(source, True, None, "cpu", None).streamed
    monkeypatch.setattr("attar.models.memory.free_bytes", lambda device: 100_000)
    chosen = choose(source, True, None, "cpu", None)
    assert chosen.streamed and "GB are free" in chosen.reason
    assert not choose(source, False, None, "cpu", False).streamed
    assert choose(source, True, None, "cpu", True).streamed


def test_the_need_is_counted_in_the_type_of_the_run(folders):
    source = find_source(str(folders["cogvideox"]))
    pipe = load_pipeline(source)
    total = sum(
        tensor.numel()
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder)
        for tensor in {id(t): t for t in part.state_dict(keep_vars=True).values()}.values()
    )
    assert weight_bytes(source, torch.float32) == 4 * total
    assert weight_bytes(source, torch.bfloat16) == 2 * total
    assert free_bytes("cpu") > 0


def test_an_empty_model_takes_no_memory(folders):
    from diffusers import CogVideoXTransformer3DModel

    model = empty_model(CogVideoXTransformer3DModel, folders["cogvideox"] / "transformer", torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters()) and not model.training


def test_weights_on_their_way_to_a_gpu_have_to_fit_into_main_memory(wan_folder, monkeypatch):
    source = find_source(str(wan_folder))
    size = weight_bytes(source, torch.bfloat16)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100 * size)
    for free, processes, streamed in (
        (size, 1, False),
        (size - 1, 1, True),
        (3 * size, 3, False),
        (3 * size, 4, True),
    ):
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        chosen = choose(source, True, None, "cuda", None, processes=processes)
        assert chosen.streamed == streamed and ("pass through main memory" in chosen.reason) == streamed
    assert not choose(source, True, None, "cuda", False, processes=9).streamed


def test_the_type_follows_the_kind_of_the_device():
    assert default_dtype("cpu") == default_dtype("cpu:0") == torch.float32
    assert default_dtype("cuda") == default_dtype("cuda:1") == torch.bfloat16
