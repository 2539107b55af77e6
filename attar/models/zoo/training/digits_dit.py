"""The training of `digits-dit`.

Stages: autoencoder and latents, which `digits-image` shares; the transformer; a diffusers folder with the curve and
measured scores. A stage that is done is skipped; a killed one goes on from its last state in the work folder.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from attar.models.zoo import digits_dit as parts
from attar.models.zoo.judges import DigitReader
from attar.models.zoo.pictures import all_pictures
from attar.models.zoo.training import stages
from attar.models.zoo.training.cards import dit_card
from attar.models.zoo.training.common import log
from attar.models.zoo.training.data import SEED
from attar.models.zoo.training.folder import assemble
from attar.models.zoo.training.stages import add_options

__all__ = ["add_options", "train"]


def train(args: argparse.Namespace) -> None:
    prepared = stages.prepare(args)
    if args.stage == "latents":
        return
    torch.manual_seed(SEED + 5)
    transformer = parts.build_transformer().to(args.device)

    def denoiser(x: Tensor, timestep: Tensor, row: Tensor) -> Tensor:
        row = torch.where(torch.rand(len(row), device=row.device) < 0.1, parts.NO_CLASS, row)
        return transformer(x, timestep, row, return_dict=False)[0]

    curve = stages.train_denoiser("transformer", [transformer], denoiser, prepared, args)
    pipe = parts.build_pipeline(prepared.vae, transformer)
    scores = score(pipe, prepared.reader, args.score_pictures)
    log(f"scores: {scores}")
    training = stages.figures(args, prepared, "transformer", curve)
    training |= {"scores": scores, "pictures_scored": args.score_pictures}
    card = dit_card(training)
    assemble(args.out, pipe.to("cpu"), prepared.reader, parts.GENERATION, training, prompt_files(), card)
    log(f"written to {args.out}")


@torch.no_grad()
def score(pipe: Any, reader: DigitReader, count: int, seed: int = 0, **overrides: Any) -> dict[str, float]:
    """Shares of right pictures over all classes in turn."""
    wanted = [all_pictures()[i % len(parts.ID2LABEL)] for i in range(count)]
    made = []
    for start in range(0, count, 35):
        classes = [i % len(parts.ID2LABEL) for i in range(start, min(start + 35, count))]
        generator = torch.Generator().manual_seed(seed + start)
        options = {**parts.GENERATION, **overrides}
        made.append(pipe(classes, generator=generator, output_type="pt", **options).images.float())
    return stages.shares(torch.cat(made), wanted, reader)


def prompt_files() -> dict[str, list[str]]:
    """The classes, in one order to calibrate with and in another to judge with; there are no others."""
    found = {}
    for k, name in enumerate(("calibration", "evaluation")):
        order = torch.randperm(len(parts.ID2LABEL), generator=torch.Generator().manual_seed(SEED + k))
        found[name] = [parts.ID2LABEL[i] for i in order.tolist()]
    return found
