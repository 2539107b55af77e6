"""README.md of the picture models' folders, with the measured figures."""

from __future__ import annotations

from typing import Any


def dit_card(training: dict[str, Any]) -> str:
    scores = training["scores"]
    return f"""---
pipeline_tag: text-to-image
library_name: diffusers
license: apache-2.0
tags: [attar, class-conditional, image-generation, toy]
---

# digits-dit

A class-conditional image pipeline of diffusers' DiT classes (`DiTPipeline`, `DiTTransformer2DModel`, `AutoencoderKL`,
`DDIMScheduler`) at a size that a laptop runs. It draws one handwritten digit in one of seven colours: 70 classes,
32x32 pixels. It exists so that compressing a diffusion transformer can be watched and measured without a GPU or a
download.

    pipe(pipe.get_label_ids(["red seven"]))

| part | what |
|---|---|
| transformer | 8 blocks, width 256, 4 heads, feed-forward 1024, adaLN-Zero, 64 tokens of 1x1 latents |
| autoencoder | 4x in space, 4 latent channels; the one of `digits-image` |
| call | 50 steps, guidance 4 (`generation.json`) |

{_data()} A class has an embedding of its own, so none could be held out.

Share of {training["pictures_scored"]} pictures, over all classes in turn, that show their class, 50 steps:

| attribute | right |
|---|---|
{_rows(scores)}

{_judges(training)}

{_training(training, "transformer", "digits-dit")}
"""


def image_card(training: dict[str, Any]) -> str:
    scores, counts = training["scores"], training["pictures_scored"]
    rows = "\n".join(
        f"| {name} | {100 * scores['trained'][name]:.1f} % | {100 * scores['held_out'][name]:.1f} % |"
        for name in scores["trained"]
    )
    return f"""---
pipeline_tag: text-to-image
library_name: diffusers
license: apache-2.0
tags: [attar, text-to-image, toy]
---

# digits-image

A text-to-image pipeline of the Stable Diffusion classes (`StableDiffusionPipeline`, `UNet2DConditionModel`,
`CLIPTextModel` with its own `CLIPTokenizer`, `AutoencoderKL`, `DDIMScheduler`) at a size that a laptop runs. It draws
one handwritten digit in one of seven colours: 32x32 pixels. It exists so that compressing a diffusion U-Net can be
watched and measured without a GPU or a download.

    a red seven · a seven in red · the digit seven written in red

| part | what |
|---|---|
| U-Net | 3 levels of 96, 160 and 160 channels, group norm, skip connections, cross-attention on two levels |
| autoencoder | 4x in space, 4 latent channels; the one of `digits-dit` |
| text encoder | CLIP, 2 layers, width 128, 16 tokens |
| call | height=32, width=32, 50 steps, guidance 4 (`generation.json`) |

{_data()} 10 of the 70 combinations of digit and colour were never trained on.

Share of {counts[0]} pictures of trained combinations, and of {counts[1]} of held-out ones, that come out right, 50
steps:

| attribute | trained | held out |
|---|---|---|
{rows}

{_judges(training)}

{_training(training, "unet", "digits-image")}
"""


def _data() -> str:
    return """Data: the handwriting of scikit-learn's `load_digits` (UCI, 1797 scans of 8x8), split by sample: 1437 to
train with, 360 for the judge."""


def _rows(scores: dict[str, float]) -> str:
    return "\n".join(f"| {name} | {100 * share:.1f} % |" for name, share in scores.items())


def _judges(training: dict[str, Any]) -> str:
    reader, kept = 100 * training["reader_accuracy"], training["autoencoder"]
    return f"""The digit is judged by the reader of `digits-video`, which reads {reader:.1f} % of held-out handwriting
in such pictures (`judge/`); the colour is measured from the pixels. The autoencoder alone keeps
{kept["psnr_db"]:.1f} dB, and {100 * kept["digits_read"]:.1f} % of held-out digits can be read behind it."""


def _training(training: dict[str, Any], part: str, name: str) -> str:
    first, second = training["minutes"]["autoencoder"], training["minutes"][part]
    machine = f"{training['device']} with {training['threads']} thread(s)"
    return f"""Trained in {first:g} minutes (autoencoder) and {second:g} ({part}) on a {machine}, seed
{training["seed"]}; the losses by step are in `training.json`. Again with

    python -m attar.models.zoo.train {name} --minutes {second:g}

Weights are stored in half precision; figures are those of the stored weights, computed in float32.
Limits: it knows its own classes and nothing else."""
