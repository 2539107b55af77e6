"""The digit reader: trained on moved and coloured handwriting, tested on samples that it never saw."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from attar.models.zoo.judges import DigitReader, crops
from attar.models.zoo.training.common import log
from attar.models.zoo.training.data import SEED, Scenes
from attar.models.zoo.training.trainer import Trainer


def train_reader(scenes: Scenes, held_out: Scenes, args) -> tuple[DigitReader, float]:
    """Digit reader on moved and coloured training handwriting; returns it with its held-out accuracy."""
    device = scenes.table.device
    reader = DigitReader().to(device).train()
    trainer = Trainer([reader], 2e-3, args.reader_minutes, args.work / "reader.state.safetensors")
    for step in trainer.steps():
        with torch.no_grad():
            row, clips = scenes.draw(48)
            frames = clips.transpose(1, 2)[
                :, torch.randint(0, clips.shape[2], (2,)).tolist()
            ]  # two frames a clip
            blur = F.avg_pool2d(frames.flatten(0, 1), 3, stride=1, padding=1, count_include_pad=False)
            mix = torch.rand(len(blur), 1, 1, 1, device=device) * 0.8
            frames = (frames.flatten(0, 1) * (1 - mix) + blur * mix).unflatten(0, frames.shape[:2])
            frames = (frames + 0.04 * torch.rand(1, device=device) * torch.randn_like(frames)).clamp(0, 1)
            windows = crops(frames).flatten(0, 1)
            target = scenes.table[row, 0].repeat_interleave(2)
        loss = trainer.update(F.cross_entropy(reader(windows), target, label_smoothing=0.05))
        if step % 200 == 0:
            log(f"reader {step} loss {loss:.4f}")
    reader.eval()
    torch.manual_seed(SEED + 1)
    right = []
    for _ in range(10):
        row, clips = held_out.draw(100)
        right.append((reader.read(clips.transpose(1, 2)).argmax(-1) == held_out.table[row, 0]).float().mean())
    accuracy = torch.stack(right).mean().item()
    log(f"reader: {accuracy:.4f} on held-out handwriting")
    return reader, accuracy
