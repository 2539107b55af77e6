"""S²Q-VDiT on complete pipelines of every family: compressed, saved, loaded again."""

import pytest
import torch
from diffusers import DiffusionPipeline
from support import pipelines

import attar
from attar.recipe import load_recipe, recipe_names
from attar.runtime.layers import packed_layers

FEW = {"trace.prompts": 2, "select.count": 3, "reconstruct.epochs": 2}
# linears in the blocks, and of these the ones that modulate (weight-only)
LAYERS = {
    "cogvideox": (24, 6), "hunyuan": (40, 6), "ltx": (30, 0), "flux": (40, 6), "pixart": (30, 0), "dit": (21, 3)
}  # fmt: skip


@pytest.mark.slow(but=["ltx", "dit", "flux"])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_pipeline_of_the_family(name, tmp_path):
    case, pipe = pipelines.CASES[name], pipelines.make(name)
    before = pipelines.generate(pipe, name)
    small = attar.compress(
        pipe, "s2q-vdit", overrides=FEW, prompts=pipelines.PROMPTS[:2],
        generation={**case.generation, "num_inference_steps": case.steps}, workspace=tmp_path / "work",
    )  # fmt: skip
    layers = packed_layers(small.transformer)
    modulation = [n for n, layer in layers.items() if layer.act_bits is None]
    assert (len(layers), len(modulation)) == LAYERS[name] and all("norm" in n for n in modulation)
    for block in small.attar_compression.components["transformer"]["blocks"]:
        assert 0 < block["error_after"] < block["error_before"] < 0.1
        assert block["attention"] is not None and block["stopped"] is None
    after = pipelines.generate(small, name)
    assert not torch.equal(after, before)
    small.save_pretrained(tmp_path / "small")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "small")
    pipe.set_progress_bar_config(disable=True)
    pipelines.assert_same_model(small, pipe, name)


@pytest.mark.slow(but=["options0-flux", "options1-hunyuan"])
@pytest.mark.parametrize("name", ["hunyuan", "flux"])
@pytest.mark.parametrize("options", [{"reconstruct.propagate": "quant"}, {"select.features": "last_hidden"}])
def test_blocks_of_two_kinds(name, options):
    """Two segments, the second behind glue that only the model applies; joint attention of text and video."""
    case = pipelines.CASES[name]
    small = attar.compress(
        pipelines.make(name), "s2q-vdit", overrides={**FEW, **options}, prompts=pipelines.PROMPTS[:2],
        generation={**case.generation, "num_inference_steps": case.steps},
    )  # fmt: skip
    assert torch.isfinite(pipelines.generate(small, name)).all()


@pytest.mark.parametrize("name", ["pixart", "cogvideox", "dit"])
def test_the_command_line_on_other_families(name, cli, tmp_path):
    """PixArt has the older callback; CogVideoX runs both guidance branches as one batch."""
    model = pipelines.save(tmp_path / name, name)
    options = ("--recipe", "hadamard")
    assert cli("compress", model, "-o", tmp_path / "small", *options).code == 0
    assert (tmp_path / "small" / "README.md").read_text().splitlines()[1] == (
        "pipeline_tag: text-to-video" if name == "cogvideox" else "pipeline_tag: text-to-image"
    )


OTHERS = ("quest", "zeroq", "genie")  # for U-Nets alone, and for autoencoders


@pytest.mark.slow(but=["attar-ptq", "svdquant", "rtn", "q-vdit", "vidit-q"])
@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name not in OTHERS])
def test_every_published_recipe(recipe):
    case, few = pipelines.CASES["wan"], dict(FEW)
    published = load_recipe(recipe)
    if not published.needs_data:
        few = {}
    elif published.finetune is not None:
        few = {"trace.prompts": 1, "finetune.steps": 6}
    elif published.reconstruct is None:
        few.pop("reconstruct.epochs")
    if published.allocate is not None:
        few["allocate.bits"] = [3, 4, 5]  # fewer than usual
    small = attar.compress(
        pipelines.make("wan"), recipe, overrides=few, prompts=pipelines.PROMPTS[:2],
        generation={**case.generation, "num_inference_steps": case.steps},
    )  # fmt: skip
    assert len(packed_layers(small.transformer)) == 30
    assert small.transformer.config["quantization_config"].fields["recipe"] == recipe
    assert torch.isfinite(pipelines.generate(small, "wan")).all()
