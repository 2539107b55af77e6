"""Pictures say what their words say; the parts of the two picture models, and a short training of each."""

import json
import math
from dataclasses import astuple

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import nn

from attar.errors import AttarError
from attar.evaluate.compare import compare
from attar.evaluate.generate import generate
from attar.models.calls import conditioning
from attar.models.source import find_source, load, load_pipeline
from attar.models.zoo import digits_dit, digits_image, zoo_folder, zoo_names
from attar.models.zoo.canvas import COLOURS, DIGITS, SIZE
from attar.models.zoo.judges import DigitReader, judge_pictures, read_colour, verdicts
from attar.models.zoo.picture_parts import LATENT_CHANNELS, LATENT_SIZE, build_scheduler, build_vae
from attar.models.zoo.pictures import (
    SENTENCES,
    all_pictures,
    parse_picture,
    random_pictures,
    split_pictures,
)
from attar.models.zoo.train import options
from attar.models.zoo.training import digits_dit as dit_training
from attar.models.zoo.training import digits_image as image_training
from attar.models.zoo.training.data import Pictures, handwriting
from attar.models.zoo.training.stages import VelocityLoss, normalise_latents, reader_accuracy
from attar.progress import SilentProgress


@pytest.fixture(scope="module")
def reader():
    return DigitReader.load(zoo_folder("digits-video"))


def test_every_picture_has_its_own_words_and_parses_back():
    pictures = all_pictures()
    words = [text for picture in pictures for text in (picture.label, *picture.sentences)]
    assert len(set(words)) == len(words) == 70 * (1 + len(SENTENCES))
    assert all(parse_picture(text) == p for p in pictures for text in (p.label, *p.sentences))
    assert parse_picture("a red fox") is None and parse_picture(" red seven ").label == "red seven"


def test_the_split_lacks_no_digit_and_no_colour():
    train, held_out = split_pictures()
    assert len(train) == 60 and len(held_out) == 10 and not set(train) & set(held_out)
    for k, values in ((0, DIGITS), (1, COLOURS)):
        assert {astuple(p)[k] for p in train} == set(range(len(values))) == {astuple(p)[k] for p in held_out}


def test_pictures_stay_on_the_canvas_and_their_colour_is_read_back():
    colour = torch.arange(len(COLOURS)).repeat(40)
    scans = torch.zeros(len(colour), 8, 8)
    scans[:, 1:7, 1:7] = 1
    made = random_pictures(scans, colour, torch.Generator().manual_seed(0))
    assert made.shape == (len(colour), 3, SIZE, SIZE) and made.min() >= 0 and made.max() <= 1
    ground = made[:, :, 0, 0][:, :, None, None]
    for side in (made[:, :, [0, -1]], made[:, :, :, [0, -1]]):
        assert torch.equal(side, ground.expand_as(side))
    assert torch.equal(read_colour(made[:, None]), colour)
    again = random_pictures(scans, colour, torch.Generator().manual_seed(0))
    assert torch.equal(made, again)


def test_the_reader_of_clips_reads_pictures(reader):
    _, _, scans, labels = handwriting()
    held_out = Pictures(scans, labels, all_pictures(), torch.device("cpu"))
    assert reader_accuracy(reader, held_out) >= 0.97
    torch.manual_seed(3)
    row, made = held_out.draw(100)
    wanted = [held_out.wanted[i] for i in row.tolist()]
    assert sum(v.digit and v.colour for v in judge_pictures(made, wanted, reader)) >= 97
    assert sum(v.digit for v in judge_pictures(made, wanted[::-1], reader)) < 50
    with pytest.raises(AttarError, match="100 pictures but 99 wanted"):
        judge_pictures(made, wanted[1:], reader)


def test_the_tokenizer_has_a_token_for_each_word():
    tokenizer = digits_image.build_tokenizer()
    for picture in all_pictures():
        for sentence in picture.sentences:
            ids = tokenizer(sentence).input_ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == sentence
            assert len(ids) == len(sentence.split()) + 2 <= digits_image.TEXT_TOKENS
    assert tokenizer("a wolf").input_ids[-1] == tokenizer.eos_token_id  # other words in characters


def test_sizes():
    """Half precision, with the judge of 0.3 MB: below 30 MB each."""

    def weights(*modules):
        return 2 * sum(tensor.numel() for module in modules for tensor in module.state_dict().values())

    tokenizer = digits_image.build_tokenizer()
    assert weights(digits_dit.build_transformer(), build_vae()) < 29e6
    unet, encoder = digits_image.build_unet(), digits_image.build_text_encoder(tokenizer)
    assert weights(unet, encoder, build_vae()) < 29e6


def test_each_block_of_the_transformer_starts_as_identity():
    transformer = digits_dit.build_transformer()
    x = torch.randn(2, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    entered, left = [], []
    transformer.pos_embed.register_forward_hook(lambda *a: entered.append(a[2]))
    transformer.transformer_blocks[-1].register_forward_hook(lambda *a: left.append(a[2]))
    labels = torch.tensor([digits_dit.NO_CLASS, 3])
    out = transformer(x, torch.tensor([5, 900]), labels, return_dict=False)[0]
    assert torch.equal(entered[0], left[0]) and out.abs().max() == 0
    assert not transformer.training  # diffusers would drop classes block by block


def test_normalising_latents_leaves_pictures_as_they_are():
    torch.manual_seed(0)
    vae = build_vae().eval()
    x = torch.rand(8, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        for conv in (vae.quant_conv, vae.post_quant_conv):
            conv.weight += 0.3 * torch.randn_like(conv.weight)
            nn.init.normal_(conv.bias)
        before = vae.encode(x).latent_dist
        back = vae.decode(before.mean).sample
        normalise_latents(vae, before.mean.mean(dim=(0, 2, 3)), before.mean.std(dim=(0, 2, 3)))
        after = vae.encode(x).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, back, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
        ratio = (before.std / after.std).mean(dim=(0, 2, 3))
        torch.testing.assert_close(ratio, before.mean.std(dim=(0, 2, 3)), atol=1e-4, rtol=1e-3)


def test_the_loss_is_that_of_the_schedule_that_samples():
    """A denoiser that knows the data has no loss, and its steps lead to the data."""
    torch.manual_seed(0)
    scheduler, loss = build_scheduler(), VelocityLoss(torch.device("cpu"))
    data = torch.randn(16, 4, 8, 8)

    def knowing(x, timestep):
        alpha, sigma = (part[timestep].view(-1, 1, 1, 1).double() for part in (loss.alpha, loss.sigma))
        return (alpha * x - data) / sigma if len(x) == len(data) else None

    assert loss(knowing, data) < 1e-3
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist()[0] == 999
    x = torch.randn_like(data).double()
    for t in scheduler.timesteps:
        x = scheduler.step(knowing(x, t.expand(16)), t, x).prev_sample
    torch.testing.assert_close(x.float(), data, atol=1e-3, rtol=1e-3)
    drawn = torch.cat([loss.timesteps(48) for _ in range(40)])
    assert drawn.min() >= 0 and drawn.max() <= 999 and 560 < drawn.float().mean() < 660


def test_models_without_weights_say_how_to_train_them(monkeypatch, tmp_path):
    import attar.models.zoo as zoo

    assert zoo_names() == ["digits-video", "digits-dit", "digits-image"]
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(
        AttarError, match=r"not here \[digits-dit\].*python -m attar.models.zoo.train digits-dit"
    ):
        find_source("digits-dit")


# ---------------------------------------------------------------------------------------------- training


SHORT = [
    "--minutes",
    "0.004",
    "--vae-minutes",
    "0.004",
    "--batch",
    "2",
    "--pictures",
    "70",
    "--score-pictures",
    "2",
]


def small_transformer():
    return DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=32, num_layers=1, sample_size=LATENT_SIZE, patch_size=2,
        in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_embeds_ada_norm=digits_dit.NO_CLASS,
    ).eval()  # fmt: skip


def small_unet(whole=digits_image.build_unet):
    return UNet2DConditionModel.from_config({**whole().config, "block_out_channels": (16, 16, 16)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both models, at small sizes, after a step or two, with one autoencoder; the second one finds it done."""
    root = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_dit, "build_transformer", small_transformer)
        patch.setattr(digits_image, "build_unet", small_unet)
        for name, folder, training in (
            ("digits-dit", "digits-dit", dit_training),
            ("digits-image", "digits-image", image_training),
            ("digits-dit", "again", dit_training),  # finds everything done
        ):
            patch.setattr(
                training.parts, "GENERATION", {**training.parts.GENERATION, "num_inference_steps": 2}
            )
            arguments = [name, "--work", str(root / "work"), "--out", str(root / folder), *SHORT]
            training.train(options(arguments))
    return root


@pytest.mark.slow
def test_a_short_training_of_the_transformer(trained):
    folder = trained / "digits-dit"
    pipe = load(str(folder))
    assert type(pipe).__name__ == "DiTPipeline" and type(pipe.transformer).__name__ == "DiTTransformer2DModel"
    assert pipe.get_label_ids(["red seven"]) == [49] == conditioning(pipe, "red seven")["class_labels"]
    source = find_source(str(folder))
    evaluation = (folder / "evaluation_prompts.txt").read_text().splitlines()
    assert sorted(source.prompts) == sorted(evaluation) == sorted(p.label for p in all_pictures())
    assert source.prompts != evaluation
    call = source.call_arguments(num_inference_steps=2)
    made = generate(pipe, ["red seven"], call=call)
    assert made.videos.shape == (1, 1, 3, SIZE, SIZE) and call["guidance_scale"] == 4.0
    training = json.loads((folder / "training.json").read_text())
    assert training["curves"]["transformer"][0][0] == 0 and training["reader_accuracy"] >= 0.97
    assert f"{100 * training['reader_accuracy']:.1f} % of held-out" in (folder / "README.md").read_text()
    assert DigitReader.load(folder)


@pytest.mark.slow
def test_a_short_training_of_the_unet(trained):
    folder = trained / "digits-image"
    pipe = load(str(folder))
    assert (
        type(pipe).__name__ == "StableDiffusionPipeline"
        and type(pipe.unet).__name__ == "UNet2DConditionModel"
    )
    source, held_out = find_source(str(folder)), set(split_pictures()[1])
    assert not {parse_picture(p) for p in source.prompts} & held_out
    evaluation = (folder / "evaluation_prompts.txt").read_text().splitlines()
    assert {parse_picture(p) for p in evaluation[:30]} == held_out and len(evaluation) == 120
    made = generate(pipe, ["a red seven"], call=source.call_arguments(num_inference_steps=2))
    assert made.videos.shape == (1, 1, 3, SIZE, SIZE)
    both = [
        trained / name / "vae" / "diffusion_pytorch_model.safetensors"
        for name in ("digits-dit", "digits-image")
    ]
    assert both[0].read_bytes() == both[1].read_bytes()


@pytest.mark.slow
def test_the_comparison_judges_pictures(trained, tmp_path):
    source = find_source(str(trained / "digits-dit"))
    steps = {"num_inference_steps": 2}
    data = compare(
        source, source, ["red seven", "12"], tmp_path / "a", overrides=steps, progress=SilentProgress()
    )
    assert all(pair.reference_quality == {} for pair in data.pairs)  # a number is none of the judges' words
    data = compare(source, source, ["red seven"], tmp_path / "b", overrides=steps, progress=SilentProgress())
    assert data.pairs[0].reference_quality.keys() == {"digit", "colour"}
    assert (
        data.pairs[0].reference_quality == data.pairs[0].compressed_quality and data.pairs[0].psnr == math.inf
    )


@pytest.mark.slow
def test_a_training_that_is_done_gives_the_same_weights_again(trained):
    for part in ("transformer", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (trained / "again" / name).read_bytes() == (trained / "digits-dit" / name).read_bytes()


def test_the_command_line_knows_each_models_options(capsys):
    video = options(["digits-video", "--image-minutes", "3"])
    assert (video.minutes, video.image_minutes, video.batch, video.work.name) == (
        60.0,
        3.0,
        48,
        "digits-video-training",
    )
    assert options(["--minutes", "7", "digits-video"]).minutes == 7.0
    pictures = [options([name]) for name in ("digits-dit", "digits-image")]
    assert pictures[0].work == pictures[1].work and pictures[0].out != pictures[1].out
    with pytest.raises(SystemExit):
        options(["digits-dit", "--image-minutes", "3"])
    with pytest.raises(SystemExit):
        options(["digits-sound"])
    assert "digits-dit" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-dit", "digits-image"])
def test_the_shipped_model_draws_what_is_asked_for(name):
    source = find_source(name)
    size = sum(path.stat().st_size for path in source.folder.rglob("*") if path.is_file())
    assert size <= 30e6
    training = json.loads((source.folder / "training.json").read_text())
    assert training["curves"] and training["autoencoder"]["digits_read"] > 0.98
    asked = (source.folder / "evaluation_prompts.txt").read_text().split("\n")[:12]
    made = generate(load_pipeline(source), asked, call=source.call_arguments(num_inference_steps=20))
    found = verdicts(made.videos, asked, DigitReader.load(source.folder))
    assert sum(verdict["colour"] for verdict in found) == 12
    assert sum(verdict["digit"] for verdict in found) >= 8
