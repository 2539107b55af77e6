"""The training of `digits-image`.

Stages: autoencoder and latents, which `digits-dit` shares; the U-Net with its text encoder; a diffusers folder with the
curve and measured scores. A stage that is done is skipped; a killed one goes on from its last state in the work folder.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attar.models.zoo import digits_image as parts
from attar.models.zoo.judges import DigitReader
from attar.models.zoo.pictures import SENTENCES, Picture, all_pictures, split_pictures
from attar.models.zoo.training import stages
from attar.models.zoo.training.cards import image_card
from attar.models.zoo.training.common import log
from attar.models.zoo.training.data import SEED
from attar.models.zoo.training.folder import assemble
from attar.models.zoo.training.stages import Prepared, add_options

__all__ = ["add_options", "train"]


def train(args: argparse.Namespace) -> None:
    prepared = without_held_out(stages.prepare(args))
    if args.stage == "latents":
        return
    torch.manual_seed(SEED + 6)
    tokenizer = parts.build_tokenizer()
    text_encoder = parts.build_text_encoder(tokenizer).to(args.device)
    unet = parts.build_unet().to(args.device)
    prompts = [sentence for picture in all_pictures() for sentence in picture.sentences]
    ids = tokenizer([*prompts, ""], padding="max_length", return_tensors="pt").input_ids.to(args.device)

    def denoiser(x: Tensor, timestep: Tensor, row: Tensor) -> Tensor:
        sentence = len(SENTENCES) * row + torch.randint(len(SENTENCES), row.shape, device=row.device)
        nothing = torch.rand(len(row), device=row.device) < 0.1
        text = text_encoder(ids[torch.where(nothing, len(prompts), sentence)])[0]
        return unet(x, timestep, text, return_dict=False)[0]

    curve = stages.train_denoiser("unet", [unet, text_encoder], denoiser, prepared, args)
    pipe = parts.build_pipeline(tokenizer, text_encoder, prepared.vae, unet)
    train_split, held_out = split_pictures()
    scores = {
        "trained": score(pipe, prepared.reader, train_split, args.score_pictures),
        "held_out": score(pipe, prepared.reader, held_out, args.score_pictures // 2, seed=1000),
    }
    log(f"scores: {scores}")
    training = stages.figures(args, prepared, "unet", curve)
    training |= {"scores": scores, "pictures_scored": [args.score_pictures, args.score_pictures // 2]}
    card = image_card(training)
    assemble(args.out, pipe.to("cpu"), prepared.reader, parts.GENERATION, training, prompt_files(), card)
    log(f"written to {args.out}")


def without_held_out(prepared: Prepared) -> Prepared:
    """Latents of the trained combinations of digit and colour alone."""
    trained = split_pictures()[0]
    known = torch.tensor([picture in trained for picture in all_pictures()])[prepared.row.cpu()]
    return replace(prepared, latents=prepared.latents[known], row=prepared.row[known])


@torch.no_grad()
def score(
    pipe: Any, reader: DigitReader, wanted: list[Picture], count: int, seed: int = 0, **overrides: Any
) -> dict[str, float]:
    """Shares of right pictures over the wanted ones in turn, in all sentences."""
    asked = [(picture.sentences[k], picture) for k in range(len(SENTENCES)) for picture in wanted]
    asked = [asked[i % len(asked)] for i in range(count)]
    made = []
    for start in range(0, count, 35):
        sentences = [sentence for sentence, _ in asked[start : start + 35]]
        generator = torch.Generator().manual_seed(seed + start)
        options = {**parts.GENERATION, **overrides}
        made.append(pipe(sentences, generator=generator, output_type="pt", **options).images.float())
    return stages.shares(torch.cat(made), [picture for _, picture in asked], reader)


def prompt_files() -> dict[str, list[str]]:
    """Sentences to calibrate with, of trained combinations, and to judge with: those never trained on come first."""
    train_split, held_out = split_pictures()

    def shuffled(some: list[Picture]) -> list[str]:
        sentences = [sentence for picture in some for sentence in picture.sentences]
        order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(SEED)).tolist()
        return [sentences[i] for i in order]

    trained = shuffled(train_split)
    half = len(trained) // 2
    return {"calibration": trained[:half], "evaluation": [*shuffled(held_out), *trained[half:]]}
