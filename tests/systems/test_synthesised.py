"""ZeroQ and Genie as recipes: the decoder of a Sana pipeline's autoencoder, from a command to pictures."""

import json

import pytest
import torch
from diffusers import AutoencoderDC, DiffusionPipeline
from support import autoencoders, pipelines, unets
from support.commands import contents

import attar
from attar.errors import AttarError
from attar.models.adapter import ModelAdapter
from attar.models.source import is_compressed
from attar.recipe import load_recipe
from attar.runtime.backend import use_backend
from attar.runtime.layers import packed_layers
from attar.synthesis import _number

FEW = {"synthesize.count": 4, "synthesize.side": 8, "synthesize.steps": 20, "reconstruct.epochs": 1}
SMALL = {"zeroq": {**FEW, "allocate.samples": 2}, "genie": {**FEW, "rounding.epochs": 1, "rounding.lr": 0.05}}
LAYERS = {
    "decoder.up_blocks.1.0.attn.to_q": "self_attn.q",
    "decoder.up_blocks.1.0.attn.to_k": "self_attn.k",
    "decoder.up_blocks.1.0.attn.to_v": "self_attn.v",
    "decoder.up_blocks.1.0.attn.to_out": "self_attn.o",
    "decoder.up_blocks.1.0.conv_out.conv_inverted.linear": "ffn.up",
    "decoder.up_blocks.1.0.conv_out.conv_point.linear": "ffn.down",
    "decoder.up_blocks.0.0.conv.linear": "upsample",
    "decoder.up_blocks.0.1.conv1.linear": "resnet.conv1",
    "decoder.up_blocks.0.1.conv2.linear": "resnet.conv2",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return autoencoders.save(tmp_path_factory.mktemp("models") / "sana")


def settings(recipe, **more):
    return [part for k, v in {**SMALL[recipe], **more}.items() for part in ("--set", f"{k}={v}")]


@pytest.fixture(scope="module")
def whole(commands, model, tmp_path_factory):
    """The folder that an uninterrupted run has made, once for each recipe."""
    made = {}

    def of(recipe):
        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("whole") / "small"
            arguments = ("compress", model, "--recipe", recipe, *settings(recipe), "-o", made[recipe])
            assert commands.run(*arguments) == 0
        return made[recipe]

    return of


def decoded(vae):
    with torch.no_grad(), use_backend("reference"):
        return vae.decode(autoencoders.latents(2, seed=5)).sample


@pytest.mark.slow(but=["genie"])
@pytest.mark.parametrize("recipe", SMALL)
def test_from_the_command_to_pictures(recipe, model, whole):
    """The decoder's units are packed, all else is as it was, and what is loaded is what was made."""
    folder, original = whole(recipe), AutoencoderDC.from_pretrained(model / "vae")
    vae = AutoencoderDC.from_pretrained(folder / "vae")
    assert set(packed_layers(vae)) == set(LAYERS)
    made = attar.compress(str(model), recipe, overrides=SMALL[recipe])
    states = vae.state_dict(), made.vae.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1]) and len(states[0]) == len(
        states[1]
    )
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert torch.equal(decoded(vae), decoded(made.vae)) and torch.equal(decoded(vae), decoded(pipe.vae))
    exact = decoded(original)
    error = (decoded(vae) - exact).square().mean() / exact.var()
    assert 1e-6 < error < 0.1
    before, after = contents(model), contents(folder)
    kept = [name for name in before if not name.startswith("vae/")]
    assert len(kept) > 5 and all(after[name] == before[name] for name in kept)
    own = original.state_dict()
    assert all(torch.equal(own[key], vae.state_dict()[key]) for key in own if key.startswith("encoder."))


@pytest.mark.parametrize("recipe", SMALL)
def test_the_evidence_and_the_card(recipe, whole):
    evidence = json.loads((whole(recipe) / "compression.json").read_text())
    part = evidence["components"]["vae"]
    assert [block["block"] for block in part["blocks"]] == [
        "decoder.up_blocks.1.0", "decoder.up_blocks.0.0", "decoder.up_blocks.0.1"
    ]  # fmt: skip
    assert list(evidence["components"]) == ["vae"] and evidence["prompts"] == []
    assert part["synthesis"]["distance"] > 0 and all(0 < b["error_after"] < 1 for b in part["blocks"])
    assert (evidence["allocation"] is not None) == (recipe == "zeroq")
    card = (whole(recipe) / "README.md").read_text()
    assert "| synthesised by |" in card and "| vae |" in card


@pytest.mark.slow(but=["genie"])
@pytest.mark.parametrize("recipe", SMALL)
def test_a_killed_run_goes_on(recipe, commands, model, whole, tmp_path):
    """Each process puts two files in their places; the bytes are those of an uninterrupted run in the end."""
    out = tmp_path / "small"
    arguments = ("compress", model, "--recipe", recipe, *settings(recipe), "-o", out)
    assert commands.run_killed(*arguments, out=out, writes=[2]) >= 2
    assert contents(out) == contents(whole(recipe))
    assert "vae/synthesised.safetensors" in contents(tmp_path / "small.work")


def test_two_processes_choose_the_same_bits(commands, model, whole, tmp_path):
    """Codes are the nearest integers, so they are equal then; what is learned in batches rounds otherwise."""
    arguments = (
        "compress",
        model,
        "--recipe",
        "zeroq",
        *settings("zeroq"),
        "-o",
        tmp_path / "small",
        "--device",
        "cpu",
    )
    command = commands.start(*arguments, processes=2)
    assert command.wait_all() == [0, 0], command.log.read_text()
    one, two = (
        packed_layers(AutoencoderDC.from_pretrained(f / "vae")) for f in (whole("zeroq"), tmp_path / "small")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].get_buffer("codes"), two[name].get_buffer("codes")) for name in one)


def test_in_memory_are_the_same_bytes(commands, model, whole, tmp_path):
    """Otherwise only the autoencoder is loaded."""
    arguments = (
        "compress",
        model,
        "--recipe",
        "genie",
        *settings("genie"),
        "-o",
        tmp_path / "small",
        "--no-stream",
    )
    assert commands.run(*arguments) == 0
    assert contents(tmp_path / "small") == contents(whole("genie"))


def test_the_data_decide(model):
    """Noise of the same count gives other codes by Genie, and other clipping by ZeroQ, whose codes are the nearest."""
    found = {}
    for recipe in SMALL:
        alike = {**SMALL[recipe], "allocate": None}
        for by in ("noise", load_recipe(recipe).synthesize.by):
            made = attar.compress(str(model), recipe, overrides={**alike, "synthesize.by": by})
            found.setdefault(recipe, []).append(made.vae.state_dict())

    def differ(recipe, buffer):
        one, other = found[recipe]
        return [not torch.equal(one[key], other[key]) for key in (f"{name}.{buffer}" for name in LAYERS)]

    assert any(differ("genie", "codes")) and any(differ("zeroq", "act_clip"))
    assert not any(differ("zeroq", "codes"))


def test_bits_by_the_error_of_the_pictures(model):
    """Units whose errors come to little in the decoder's output count for little; alike, they count for one."""
    few = {**SMALL["zeroq"], "reconstruct": None}
    followed = attar.compress(str(model), "zeroq", overrides=few).attar_compression.allocation
    alike = attar.compress(str(model), "zeroq", overrides={**few, "allocate.objective": "block"})
    reach = followed.influence["vae"]
    assert len(reach) == 3 and all(value > 0 for value in reach.values())
    plain = alike.attar_compression.allocation.sensitivity["vae"]
    for name, errors in followed.sensitivity["vae"].items():
        factor = next(value for block, value in reach.items() if name.startswith(f"{block}."))
        quantized = {bits: error / factor for bits, error in errors.items()}
        assert all(
            abs(quantized[b] / plain[name][b] - 1) < 0.2 for b in ("2", "3")
        )  # activations in floating point
    assert "error of the decoder's output" in followed.summary()


def test_what_is_seen_of_an_autoencoder():
    vae = autoencoders.make_autoencoder(blocks=("ResBlock", "EfficientViTBlock"))
    adapter = ModelAdapter.of(vae)
    adapter.observe({"hidden_states": autoencoders.latents(1)})
    roles = {x.name: x.role for block in adapter.blocks for x in adapter.linears(block) if x.kept is None}
    assert roles == LAYERS
    assert [block.index for block in adapter.blocks] == [0, 1, 2]
    outside = {x.role for x in adapter.outside_linears()}
    assert outside == {"encoder", "embedding", "head"}
    published = ModelAdapter.of(autoencoders.make_autoencoder(channels=(8, 8, 16), first=0))
    assert [block.name for block in published.blocks] == [
        "decoder.up_blocks.1.0", "decoder.up_blocks.1.1", "decoder.up_blocks.2.0"
    ]  # fmt: skip
    assert {x.name: x.role for x in published.outside_linears()}["decoder.conv_out.conv.linear"] == "head"


def test_an_autoencoder_in_a_folder_of_its_own(commands, cli, model, whole, tmp_path):
    """Also after a kill its layers are those that it gets in a pipeline, and both loaders give it back."""
    arguments = ("compress", model / "vae", "--recipe", "genie", *settings("genie"), "-o", tmp_path / "small")
    assert [commands.run(*arguments, writes=writes) for writes in (3, None)] == [-9, 0]
    vae = AutoencoderDC.from_pretrained(tmp_path / "small")
    packed = {name: layer.state_dict() for name, layer in packed_layers(vae).items()}
    other = packed_layers(AutoencoderDC.from_pretrained(whole("genie") / "vae"))
    assert set(packed) == set(LAYERS)
    assert all(
        torch.equal(packed[n][k], v) for n, layer in other.items() for k, v in layer.state_dict().items()
    )
    assert torch.equal(decoded(vae), decoded(attar.load(tmp_path / "small")))
    assert sorted(contents(tmp_path / "small")) == [
        "README.md", "compression.json", "config.json", "diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    card = (tmp_path / "small" / "README.md").read_text()
    assert "vae = AutoencoderDC.from_pretrained" in card and "| vae |" in card and "pipeline_tag" not in card
    vae.save_pretrained(tmp_path / "again")
    assert torch.equal(decoded(AutoencoderDC.from_pretrained(tmp_path / "again")), decoded(vae))
    budget = ("--recipe", "zeroq", *settings("zeroq"), "--budget", "3.2bits", "-o", tmp_path / "plan.yaml")
    done = cli("allocate", model / "vae", *budget)
    assert done.code == 0 and "decoder.up_blocks.0.0.conv.linear" in done.out, done.err
    done = cli(
        *(
            "compress",
            model / "vae",
            *budget[:-4],
            "--plan",
            tmp_path / "plan.yaml",
            "-o",
            tmp_path / "planned",
        )
    )
    assert done.code == 0, done.err


def test_in_sixteen_bits(cli, model, tmp_path):
    options = ("--recipe", "genie", *settings("genie"), "--dtype", "bfloat16", "-o", tmp_path / "small")
    done = cli("compress", model, *options)
    assert done.code == 0, done.err
    vae = AutoencoderDC.from_pretrained(tmp_path / "small" / "vae", torch_dtype=torch.bfloat16)
    with torch.no_grad(), use_backend("reference"):
        assert torch.isfinite(vae.decode(autoencoders.latents(2).bfloat16()).sample).all()


def test_an_autoencoder_as_an_object(model):
    vae = AutoencoderDC.from_pretrained(model / "vae")
    made = attar.compress(vae, "genie", overrides=SMALL["genie"])
    assert made.vae is vae and set(packed_layers(vae)) == set(LAYERS)
    assert torch.equal(
        decoded(vae), decoded(attar.compress(str(model), "genie", overrides=SMALL["genie"]).vae)
    )


# ------------------------------------------------------------------------------------------ what is refused


def test_autoencoders_alone_are_for_their_recipes(cli, model, tmp_path):
    out = ("-o", tmp_path / "out")
    assert (
        "the folder holds an autoencoder alone (AutoencoderDC)"
        in cli("compress", model / "vae", *out).message
    )
    assert "the folder holds an autoencoder alone" in cli("generate", model / "vae", "a dog").message
    asked = cli("compress", model / "vae", "--recipe", "zeroq", "--stream", *out).message
    assert "cannot be streamed: it is one autoencoder" in asked
    missing = cli("compress", model / "transformer", "--recipe", "zeroq", *out).message
    assert "holds no diffusers pipeline" in missing
    pipelines.image_vae(4).save_pretrained(tmp_path / "kl")
    message = cli("compress", tmp_path / "kl", "--recipe", "genie", *out).message
    assert "no decoder of the model keeps running statistics" in message and "[AutoencoderKL]" in message


@pytest.mark.parametrize("recipe", SMALL)
@pytest.mark.parametrize("kind", ["wan", "sd"])
def test_models_without_statistics_are_refused_at_once(recipe, kind, cli, wan_folder, tmp_path):
    folder = wan_folder if kind == "wan" else unets.save(tmp_path / "sd")
    message = cli("compress", folder, "--recipe", recipe, "-o", tmp_path / "out").message
    assert (
        "no decoder of the model keeps running statistics" in message
        and "Take a recipe that traces" in message
    )
    assert not (tmp_path / "out.work").exists()
    with pytest.raises(AttarError, match="no decoder of the model keeps running statistics"):
        attar.compress(pipelines.make("wan"), recipe)


def test_denoisers_without_a_pipeline_are_refused():
    with pytest.raises(AttarError, match="a model without its pipeline cannot be traced"):
        attar.compress(pipelines.make("wan").transformer, "rtn")
    with pytest.raises(AttarError, match="no decoder of the model keeps running statistics"):
        attar.compress(pipelines.make("wan").transformer, "zeroq")


def test_statistics_that_saw_no_data_are_refused(tmp_path):
    with pytest.raises(AttarError, match="no data ever passed"):
        attar.compress(autoencoders.sana_pipeline(autoencoders.make_autoencoder()), "zeroq", overrides=FEW)


def test_forecasts_are_of_denoisers(cli, model):
    said = "is made for denoisers, and the recipe compresses an autoencoder"
    assert said in cli("compress", model, "--recipe", "zeroq", "--dry-run").message
    assert said in cli("plan", "wan-1.3b", "--recipe", "genie", "--gpu", "cpu").message
    assert said in cli("bench", "digits-video", "--recipe", "zeroq").message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trace": {}}, "set trace and select to null"),
        ({"finetune": {"scale_lr": 1e-3}}, "finetune to null"),
        ({"quantize.step_groups": 2}, "step_groups to 1"),
        ({"reconstruct.loss": "token_weighted"}, "reconstruct.loss to mse"),
        ({"allocate.objective": "latents"}, "allocate.objective to output or block"),
        ({"synthesize.by": "noise", "synthesize.known": False}, "no other statistics than known ones"),
        ({"synthesize.by": "generator", "synthesize.count": 1}, "leaves one alone"),
    ],
)
def test_settings_that_do_not_fit(change, said):
    with pytest.raises(AttarError, match=said):
        load_recipe("zeroq", change)


def test_output_beside_the_model(cli, model, tmp_path):
    """A folder inside an autoencoder would be copied with it; one inside a pipeline is none of its components."""
    done = cli("compress", model / "vae", "--recipe", "zeroq", *settings("zeroq"), "-o", model / "vae" / "x")
    assert done.code == 1 and "lies in the model" in done.err and not (model / "vae" / "x").exists()
    pipeline = tmp_path / "pipeline"
    (pipeline / "out").mkdir(parents=True)
    (pipeline / "model_index.json").write_text('{"_class_name": "SanaPipeline", "vae": ["diffusers", "X"]}')
    (pipeline / "out" / "config.json").write_text('{"quantization_config": {"quant_method": "attar"}}')
    assert not is_compressed(pipeline) and is_compressed(pipeline / "out")


@pytest.mark.parametrize("factor", ["a", 0, -1.0, float("inf")])
def test_a_factor_that_is_none(factor):
    with pytest.raises(AttarError, match="scaling_factor is"):
        _number({"scaling_factor": factor}, "scaling_factor", 1.0)
    assert _number({"scaling_factor": None}, "scaling_factor", 1.0) == 1.0
