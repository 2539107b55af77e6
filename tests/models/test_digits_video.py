"""The built-in model as it ships: real classes, real handwriting, figures that hold."""

import json

import pytest
import torch

from attar.models.source import find_source, load
from attar.models.zoo import zoo_folder
from attar.models.zoo.clips import parse_prompt, split_scenes
from attar.models.zoo.judges import DigitReader, judge

FOLDER = zoo_folder("digits-video")


@pytest.fixture(scope="module")
def pipe():
    return load("digits-video")


def test_it_is_an_ordinary_diffusers_folder_of_the_real_classes(pipe):
    assert type(pipe).__name__ == "WanPipeline"
    assert type(pipe.transformer).__name__ == "WanTransformer3DModel"
    assert type(pipe.vae).__name__ == "AutoencoderKLWan"
    assert type(pipe.text_encoder).__name__ == "UMT5EncoderModel"
    config = pipe.transformer.config
    assert config.num_layers >= 8 and config.num_attention_heads * config.attention_head_dim >= 256
    weights = sum(p.stat().st_size for p in FOLDER.rglob("*.safetensors"))
    assert weights <= 60e6
    assert not list(FOLDER.rglob("*.bin")) and not list(FOLDER.rglob("*.pt"))


def test_its_prompts_are_its_own_sentences_and_evaluation_ones_were_held_out():
    source = find_source("digits-video")
    train, held_out = split_scenes()
    assert len(source.prompts) >= 40
    assert {parse_prompt(p) for p in source.prompts} <= set(train)
    evaluation = (FOLDER / "evaluation_prompts.txt").read_text().split("\n")[:-1]
    assert len(evaluation) >= 200 and {parse_prompt(p) for p in evaluation} <= set(held_out)


def test_the_reader_reads_handwriting_that_it_was_not_trained_on():
    from attar.models.zoo.training.data import Scenes, handwriting

    _, _, scans, labels = handwriting()
    held_out = Scenes(scans, labels, split_scenes()[1], torch.device("cpu"))
    torch.manual_seed(7)
    row, clips = held_out.draw(300)
    reader = DigitReader.load(FOLDER)
    assert (reader.read(clips.transpose(1, 2)).argmax(-1) == held_out.table[row, 0]).float().mean() >= 0.97


def test_a_few_held_out_prompts_come_out_as_the_card_says(pipe):
    scenes = split_scenes()[1][7::80]  # 3 scenes
    call = find_source("digits-video").call_arguments()
    video = pipe(
        [s.prompt for s in scenes], output_type="pt", generator=torch.Generator().manual_seed(0), **call
    ).frames
    verdicts = judge(video.float(), scenes, DigitReader.load(FOLDER))
    promised = json.loads((FOLDER / "training.json").read_text())["scores"]
    for name in ("digit", "colour", "direction"):
        share = sum(getattr(v, name) for v in verdicts) / len(verdicts)
        assert share >= promised[name] - 0.35  # one of three clips may be wrong


@pytest.mark.slow
def test_every_held_out_prompt_against_the_bar(pipe):
    from attar.models.zoo.training.digits_video import score

    shares = score(pipe, DigitReader.load(FOLDER), split_scenes()[1])
    promised = json.loads((FOLDER / "training.json").read_text())["scores"]
    assert all(abs(shares[name] - promised[name]) < 0.02 for name in promised)
