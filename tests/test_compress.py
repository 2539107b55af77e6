"""Compress, save, load with plain diffusers: the same model, whichever way it went."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from safetensors import safe_open
from support import pipelines
from support.commands import contents
from support.fixtures import SMALL

import attar
from attar.errors import AttarError
from attar.models.source import find_source, load_pipeline
from attar.recipe import Recipe, load_recipe
from attar.runtime.layers import packed_layers

FEW = {"trace.prompts": 2, "select.count": 3, "reconstruct.epochs": 1}


def compressed(name="wan", recipe="s2q-vdit", **options):
    case = pipelines.CASES[name]
    settings = dict(
        prompts=pipelines.PROMPTS[:2], generation={**case.generation, "num_inference_steps": case.steps}
    )
    return attar.compress(pipelines.make(name), recipe, **{"overrides": FEW, **settings, **options})


def reload(folder, **options):
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def small():
    return compressed("wan")


@pytest.fixture(scope="module")
def saved(cli_once, wan_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "small"
    assert cli_once("compress", wan_folder, "-o", out, *SMALL) == 0
    return out


@pytest.fixture(scope="module")
def cli_once(commands):
    return commands.run


def test_the_python_interface(small, tmp_path):
    assert type(small) is WanPipeline and len(packed_layers(small.transformer)) == 30
    evidence = small.attar_compression
    assert evidence.prompts == pipelines.PROMPTS[:2] and set(evidence.seconds) == {"trace", "transformer"}
    selection = evidence.components["transformer"]["selection"]
    assert selection["policy"] == "salient" and len(selection["chosen"]) == 3
    assert selection["table"]["prompt"] == [0, 0, 0, 1, 1, 1] and selection["table"]["step"] == [0, 1, 2] * 2
    for block in evidence.components["transformer"]["blocks"]:
        assert 0 < block["error_after"] < block["error_before"] and len(block["loss"]) == 2
        curve = block["attention"]["curve"]
        assert len(curve) == 21 and curve == sorted(curve) and curve[0] == 0 and curve[-1] == pytest.approx(1)
        weights = list(block["attention"]["weights"].values())
        assert weights == sorted(weights) and weights[0] >= 0.5 and weights[-1] <= 1
    json.dumps(evidence.to_json(), allow_nan=False)
    small.save_pretrained(tmp_path)
    pipelines.assert_same_model(small, reload(tmp_path), "wan")


def test_saving_again_gives_the_same_tensors(saved, tmp_path):
    pipe = reload(saved)
    pipe.save_pretrained(tmp_path / "again")
    states = [reload(folder).transformer.state_dict() for folder in (saved, tmp_path / "again")]
    assert states[0].keys() == states[1].keys()
    assert all(
        torch.equal(states[0][k], states[1][k]) and states[0][k].dtype == states[1][k].dtype
        for k in states[0]
    )


def test_the_saved_folder(saved, wan_folder):
    found = contents(saved)
    assert json.loads(found["compression.json"])["recipe"]["name"] == "s2q-vdit"
    rows = json.loads(found["compression.json"])["components"]["transformer"]["plan"]
    assert {row["bits"] for row in rows} == {"W4A6", "kept"}
    card = found["README.md"].decode()
    assert card.startswith("---\npipeline_tag: text-to-video") and "| `ffn.up` | W4A6 | 3 |" in card
    changed = json.loads(found["compression.json"])["changed_settings"]
    assert changed == {"trace.prompts": [2, 10], "select.count": [3, 40], "reconstruct.epochs": [2, 15]}
    assert "| reconstruct.epochs | 2 (published recipe: 15) |" in card
    for name in ("generation.json", "calibration_prompts.txt", "model_index.json"):
        assert found[name] == (wan_folder / name).read_bytes()
    assert attar.verify_folder(saved) == [saved / "transformer"]


def test_the_command_and_the_interface_give_the_same_model(saved, wan_folder):
    recipe = load_recipe("s2q-vdit", {"trace.prompts": 2, "select.count": 3, "reconstruct.epochs": 2})
    pipe = attar.compress(str(wan_folder), recipe)
    theirs, ours = reload(saved).transformer.state_dict(), pipe.transformer.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)


def test_the_card_inherits_the_licence_and_the_call(commands, wan_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(wan_folder, source)
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: a-name\n---\n# A model\n")
    settings = json.loads((source / "generation.json").read_text())
    (source / "generation.json").write_text(json.dumps({**settings, "guidance_scale": 4.5}))
    assert commands.run("compress", source, "-o", tmp_path / "small", "--recipe", "rtn") == 0
    card = (tmp_path / "small" / "README.md").read_text()
    assert (
        "\nlicense: other\nlicense_name: a-name\n" in card
        and "guidance_scale=4.5" in card
        and "published recipe" not in card
    )


def test_loading_in_bfloat16(saved):
    pipe, exact = reload(saved, torch_dtype=torch.bfloat16), reload(saved)
    layer = pipe.transformer.blocks[0].attn1.to_q
    assert layer.bias.dtype == torch.bfloat16 and layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.codes, exact.transformer.blocks[0].attn1.to_q.codes)
    difference = (pipelines.generate(pipe, "wan").float() - pipelines.generate(exact, "wan")).norm()
    assert difference < 0.05 * pipelines.generate(exact, "wan").norm()


def test_compressing_a_bfloat16_model(tmp_path):
    pipe = pipelines.make("wan").to(torch.bfloat16)
    small = attar.compress(
        pipe, "s2q-vdit", overrides=FEW, prompts=pipelines.PROMPTS[:2],
        generation={**pipelines.CASES["wan"].generation, "num_inference_steps": 3}, workspace=tmp_path / "work",
    )  # fmt: skip
    assert {p.dtype for p in small.transformer.parameters()} == {torch.bfloat16}
    assert small.transformer.blocks[1].ffn.net[2].compute_dtype == torch.bfloat16
    again = attar.compress(
        pipelines.make("wan").to(torch.bfloat16), "s2q-vdit", overrides=FEW, prompts=pipelines.PROMPTS[:2],
        generation={**pipelines.CASES["wan"].generation, "num_inference_steps": 3}, workspace=tmp_path / "work",
    )  # fmt: skip
    first, second = small.transformer.state_dict(), again.transformer.state_dict()
    assert all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first)
    assert again.transformer.blocks[1].ffn.net[2].compute_dtype == torch.bfloat16


def test_blocks_learned_in_bfloat16(small):
    other = compressed(overrides={**FEW, "precision": "bfloat16"})
    assert other.attar_compression.recipe["precision"] == "bfloat16"
    assert "precision" not in small.attar_compression.recipe
    blocks, others = (p.attar_compression.components["transformer"]["blocks"] for p in (small, other))
    for ours, theirs in zip(blocks, others, strict=True):
        assert theirs["error_after"] < theirs["error_before"]
        assert theirs["precision"] == "bfloat16" and "precision" not in ours
        assert theirs["error_before"] == pytest.approx(ours["error_before"], rel=0.1)
        # three samples and one epoch leave much to chance, in either direction
        assert theirs["error_after"] == pytest.approx(ours["error_after"], rel=0.4)
    first, second = (layer_codes(p) for p in (small, other))
    same = (first == second).double().mean().item()
    # AdamW takes steps whose size is not the gradient's
    assert 0.5 < same < 1, f"{same:.3f} of the codes are equal"
    assert {p.dtype for p in other.transformer.parameters()} == {torch.float32}


def layer_codes(pipe):
    return torch.cat([layer.codes.flatten() for layer in packed_layers(pipe.transformer).values()])


@pytest.mark.slow
def test_two_experts_are_one_job(tmp_path):
    pipe = compressed("wan22")
    assert len(packed_layers(pipe.transformer)) == len(packed_layers(pipe.transformer_2)) == 30
    steps = {
        n: set(part["selection"]["table"]["step"]) for n, part in pipe.attar_compression.components.items()
    }
    assert (
        steps["transformer"] and steps["transformer_2"] and not steps["transformer"] & steps["transformer_2"]
    )
    pipe.save_pretrained(tmp_path)
    assert len(attar.verify_folder(tmp_path)) == 2
    pipelines.assert_same_model(pipe, reload(tmp_path), "wan22")


def test_an_expert_that_never_ran(tmp_path):
    with pytest.raises(AttarError, match=r"finds|did not run") as caught:
        compressed("wan22", generation={**pipelines.CASES["wan22"].generation, "num_inference_steps": 2})
    assert "transformer" in str(caught.value)


def test_unknown_arguments_of_the_pipeline():
    with pytest.raises(AttarError, match=r"rejects its arguments.*colour"):
        compressed("wan", generation={"colour": "red"})
    with pytest.raises(AttarError, match="stored as JSON"):
        compressed("wan", generation={"latents": torch.zeros(1)})


def test_overwriting_a_compressed_model(cli, wan_folder, tmp_path):
    out = tmp_path / "small"
    assert cli("compress", wan_folder, "-o", out, "--recipe", "rtn").code == 0
    (out / "stale.txt").write_text("x")
    options = ("--overwrite", "--workspace", tmp_path / "other", "--recipe", "hadamard")
    assert cli("compress", wan_folder, "-o", out, *options).code == 0
    assert not (out / "stale.txt").exists() and "hadamard" in (out / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "small", "small.work"]


def test_sharded_checkpoints(saved, tmp_path):
    pipe = reload(saved)
    pipe.transformer.save_pretrained(tmp_path / "transformer", max_shard_size="40KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert attar.verify_folder(tmp_path)


def test_a_recipe_object_and_short_arguments():
    recipe = Recipe(name="mine", **{k: v for k, v in load_recipe("rtn").model_dump().items() if k != "name"})
    pipe = attar.compress(pipelines.make("wan"), recipe, weights=3, acts=16)
    layer = pipe.transformer.blocks[0].attn1.to_q
    assert (layer.weight_bits, layer.act_bits) == (3, None)
    assert pipe.attar_compression.recipe["name"] == "mine"


@pytest.mark.slow(but=["options2"])
@pytest.mark.parametrize("options", [{}, {"quantize.group_size": 16}, {"quantize.rotation": "hadamard"}])
def test_weight_only_is_the_whole_recipe(options, tmp_path):
    small = compressed("wan", "attar-ptq", acts=16, overrides={**FEW, **options})
    plain = compressed("wan", "rtn", acts=16, overrides={k: v for k, v in options.items() if "group" in k})
    layers, floor = packed_layers(small.transformer), packed_layers(plain.transformer)
    assert layers.keys() == floor.keys()
    for name, layer in layers.items():
        assert layer.act_bits is None and layer.group_size == options.get("quantize.group_size")
        assert [t.kind for t in layer.transforms] == [
            "channel_scale",
            options.get("quantize.rotation", "kronecker"),
        ]
        assert not torch.equal(layer.codes, floor[name].codes)
    small.save_pretrained(tmp_path / "small")
    pipelines.assert_same_model(small, reload(tmp_path / "small"), "wan")


def test_the_card_and_the_evidence_say_what_ran(cli, wan_folder, tmp_path):
    out = tmp_path / "small"
    options = [
        "--acts",
        "16",
        "--set",
        "quantize.group_size=16",
        "--set",
        "quantize.roles={head: {weights: 8}}",
    ]
    assert cli("compress", wan_folder, "-o", out, *SMALL, *options).code == 0
    part = json.loads((out / "compression.json").read_text())["components"]["transformer"]
    rows = {row["role"]: row for row in part["plan"]}
    treatment = "channel scale, kronecker, weight clipping, gptq"
    assert rows["self_attn.q"]["bits"] == "W4A16g16" and rows["self_attn.q"]["treatment"] == treatment
    assert rows["head"]["bits"] == "W8A16g16" and rows["head"]["treatment"] == "nearest"
    card = (out / "README.md").read_text()
    assert treatment in card and "| `head` | W8A16g16 | 1 | nearest |" in card
    selection = part["selection"]
    assert sum(selection["histogram"]["prompt"].values()) == sum(selection["histogram"]["step"].values()) == 3
    assert -1 <= selection["table"]["norm_correlation"] <= 1
    assert {50, 90, 99} <= {int(float(level)) for level in part["blocks"][0]["attention"]["weights"]}


@pytest.mark.parametrize("bars", [True, False])
def test_loading_leaves_the_libraries_as_they_were(bars, wan_folder, capfd):
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    def state():
        return [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in (ours, theirs)]

    try:
        for library in (ours, theirs):
            library.enable_progress_bar() if bars else library.disable_progress_bar()
        before = state()
        load_pipeline(find_source(str(wan_folder)))
        assert state() == before
    finally:
        for library in (ours, theirs):
            library.enable_progress_bar()
    assert "Loading" not in capfd.readouterr().err


def test_layers_outside_the_blocks_follow_an_override_as_weights_only(tmp_path):
    case = pipelines.CASES["wan"]
    roles = {"head": {"weights": 8, "acts": 8}, "time_conditioning": {"weights": 8}}
    pipe = attar.compress(pipelines.make("wan"), "rtn", overrides={"quantize.roles": roles})
    packed = packed_layers(pipe.transformer)
    assert (packed["proj_out"].weight_bits, packed["proj_out"].act_bits) == (8, None)
    assert any(name.startswith("condition_embedder.time") for name in packed)
    call = {**case.generation, "num_inference_steps": 2, "output_type": "latent"}
    before = pipe(pipelines.PROMPTS[0], generator=torch.Generator().manual_seed(0), **call)[0]
    pipe.save_pretrained(tmp_path / "out")
    again = reload(tmp_path / "out")
    assert packed_layers(again.transformer).keys() == packed.keys()
    after = again(pipelines.PROMPTS[0], generator=torch.Generator().manual_seed(0), **call)[0]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_codes_of_a_bfloat16_model_stand_for_what_its_branches_leave():
    """They are the nearest to W - B A with B and A as they are packed, and not as they were before."""
    pipe, name = pipelines.make("wan").to(torch.bfloat16), "blocks.1.ffn.net.0.proj"
    with torch.no_grad():
        pipe.transformer.get_submodule(name).weight[:, :2] *= 30
    weight = pipe.transformer.get_submodule(name).weight.detach().double().clone()
    overrides = {"trace.prompts": 1, "select.count": 1, "quantize.weights": 8, "quantize.scale": False}
    overrides |= {
        "quantize.low_rank.rank": 2,
        "quantize.low_rank.metric": "output",
    }  # of data, hence in float32
    small = attar.compress(
        pipe, "svdquant", overrides=overrides, prompts=pipelines.PROMPTS[:1],
        generation=pipelines.CASES["wan"].generation | {"num_inference_steps": 2},
    )  # fmt: skip
    layer = small.transformer.get_submodule(name)
    assert layer.low_rank_in.dtype == torch.bfloat16
    left = weight - layer.low_rank_out.double() @ layer.low_rank_in.double()
    scale = layer.weight_scale.double()
    assert float(((left - layer.unpacked().double() * scale).abs() / scale).max()) < 0.5 + 1e-4


@pytest.mark.parametrize("mode", ["--stream", "--no-stream"])
def test_branches_are_subtracted_as_the_files_have_them(mode, commands, tmp_path):
    """A model that is stored in bfloat16 and computed with in float32, as on CPUs."""
    pipe, name = pipelines.make("wan"), "blocks.1.ffn.net.0.proj"
    with torch.no_grad():
        pipe.transformer.get_submodule(name).weight[:, :2] *= 30
    folder, out = pipelines.save(tmp_path / "wan", steps=2, pipe=pipe), tmp_path / "small"
    pipe.transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    weight = pipe.transformer.get_submodule(name).weight.detach().double()
    settings = ("trace.prompts=1", "select.count=1", "quantize.scale=false")
    settings += ("quantize.low_rank.rank=2", "quantize.low_rank.metric=output")
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ("compress", folder, "-o", out, "--recipe", "svdquant", "--weights", "8", mode, *options)
    assert commands.run(*arguments) == 0
    layer = reload(out).transformer.get_submodule(name)
    with safe_open(out / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_tensor(f"{name}.low_rank_in").dtype == torch.bfloat16
    left = weight - layer.low_rank_out.double() @ layer.low_rank_in.double()
    scale = layer.weight_scale.double()
    assert float(((left - layer.unpacked().double() * scale).abs() / scale).max()) < 0.5 + 1e-4
