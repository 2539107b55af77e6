"""The diffusers folder of a trained model, with its judge, its prompts, its figures and its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from attar.models.zoo.judges import DigitReader

HALF = {
    "vae": torch.float16,
    "transformer": torch.bfloat16,
    "unet": torch.bfloat16,
    "text_encoder": torch.bfloat16,
}


def assemble(
    folder: Path,
    pipe: Any,
    reader: DigitReader,
    generation: dict[str, Any],
    training: dict[str, Any],
    prompts: dict[str, list[str]],
    card: str,
) -> None:
    """Write the pipeline with half-precision weights, the judge, generation.json, training.json and README.md.

    prompts: "calibration" and "evaluation", which become text files. card: the text of README.md.
    """
    pipe.save_pretrained(folder)
    for name, dtype in HALF.items():
        for path in (folder / name).glob("*.safetensors"):
            tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(path).items()}
            save_file(tensors, path, metadata={"format": "pt"})
    (folder / "judge").mkdir(exist_ok=True)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in reader.cpu().state_dict().items()}
    save_file(weights, folder / "judge" / "digit_reader.safetensors")
    (folder / "generation.json").write_text(json.dumps(generation, indent=2) + "\n")
    (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    for name, lines in prompts.items():
        (folder / f"{name}_prompts.txt").write_text("\n".join(lines) + "\n")
    (folder / "README.md").write_text(card)
