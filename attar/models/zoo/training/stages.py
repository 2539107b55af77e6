"""What the trainings of `digits-dit` and `digits-image` share: the reader's test, the autoencoder, the latents, and the
training of a denoiser on them.

Both use one autoencoder. Its state and the latents lie in the work folder, so the second training finds them there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attar.files import writing
from attar.models.zoo import zoo_folder
from attar.models.zoo.judges import DigitReader, judge_pictures
from attar.models.zoo.picture_parts import build_scheduler, build_vae
from attar.models.zoo.pictures import Picture, all_pictures
from attar.models.zoo.training.common import autocast, ink_weighted_error, log, round_weights
from attar.models.zoo.training.data import SEED, Pictures, handwriting
from attar.models.zoo.training.trainer import Trainer

WORK = Path("work/digits-pictures-training")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(work=WORK)
    parser.add_argument("--minutes", type=float, default=50.0, help="the denoiser")
    parser.add_argument(
        "--vae-minutes", type=float, default=15.0, help="the autoencoder of both picture models"
    )
    parser.add_argument("--batch", type=int, default=48, help="pictures in a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="AdamW")
    parser.add_argument(
        "--muon-rate", type=float, default=0.0, help="Muon for the matrices; 0 uses AdamW for all"
    )
    parser.add_argument("--pictures", type=int, default=70_000, help="latents to train on")
    parser.add_argument(
        "--stage", choices=["all", "latents"], default="all", help="all, or autoencoder and latents only"
    )
    parser.add_argument("--score-pictures", type=int, default=210)


@dataclass
class Prepared:
    """What a denoiser is trained and judged with. latents: (N, 4, 8, 8), of the classes `row` (N,)."""

    reader: DigitReader
    vae: AutoencoderKL
    latents: Tensor
    row: Tensor
    evidence: dict[str, Any]  # reader_accuracy, autoencoder
    curve: list[list[float]]


def prepare(args: argparse.Namespace) -> Prepared:
    """The stages before the denoiser; what is done is skipped."""
    device = torch.device(args.device)
    args.work.mkdir(parents=True, exist_ok=True)
    scans, labels, held_scans, held_labels = handwriting()
    pictures = Pictures(scans, labels, all_pictures(), device)
    held_out = Pictures(held_scans, held_labels, all_pictures(), device)
    reader = DigitReader.load(zoo_folder("digits-video")).to(device)
    vae, curve = train_vae(pictures, args)
    evidence = {
        "reader_accuracy": round(reader_accuracy(reader, held_out), 4),
        "autoencoder": autoencoder_quality(vae, reader, held_out),
    }
    log(f"on held-out handwriting: {evidence}")
    latents, row = encode_pictures(vae, pictures, args.pictures, args.work / "latents.safetensors")
    return Prepared(reader, vae, latents, row, evidence, curve)


@torch.no_grad()
def reader_accuracy(reader: DigitReader, held_out: Pictures) -> float:
    """How often the reader, which was trained on clips, reads held-out handwriting in pictures."""
    torch.manual_seed(SEED + 1)
    right = []
    for _ in range(10):
        row, drawn = held_out.draw(100)
        right.append((reader.read(drawn[:, None]).argmax(-1) == held_out.table[row, 0]).float().mean())
    return torch.stack(right).mean().item()


def train_vae(pictures: Pictures, args: argparse.Namespace) -> tuple[AutoencoderKL, list[list[float]]]:
    torch.manual_seed(SEED)
    vae = build_vae().to(pictures.table.device)
    trainer = Trainer([vae], 2e-3, args.vae_minutes, args.work / "vae.state.safetensors")
    for step in trainer.steps():
        with torch.no_grad():
            x = pictures.draw(48)[1] * 2 - 1
        with autocast(x.device):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + (0.5 * posterior.logvar).exp() * torch.randn_like(posterior.mean)
            out = vae.decode(z).sample.float()
        kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar)
        loss = trainer.update(ink_weighted_error(out[:, :, None], x[:, :, None]) + 3e-4 * kl.float().mean())
        if step % 50 == 0:
            trainer.note(loss)
            log(f"autoencoder {step} ({trainer.progress:.2f}) loss {loss:.5f}")
    trainer.use_average()
    torch.manual_seed(SEED + 3)
    with torch.no_grad():
        sample = vae.encode(pictures.draw(min(2048, args.pictures))[1] * 2 - 1).latent_dist.mean
        normalise_latents(vae, sample.mean(dim=(0, 2, 3)), sample.std(dim=(0, 2, 3)))
    return round_weights(vae.eval(), torch.float16), trainer.curve


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold (z - mean) / std, by channel (C,), into the 1x1 convolutions around the latents; pictures stay the same.

    The pipelines of pictures know one factor for all channels and no shift.
    """
    before, after = vae.quant_conv, vae.post_quant_conv
    count = len(mean)
    before.weight[:count] /= std[:, None, None, None]
    before.bias[:count] = (before.bias[:count] - mean) / std
    before.bias[count:] -= 2 * std.log()  # the other half is the logarithm of the variance
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]


@torch.no_grad()
def autoencoder_quality(vae: AutoencoderKL, reader: DigitReader, held_out: Pictures) -> dict[str, float]:
    torch.manual_seed(SEED + 2)
    row, drawn = held_out.draw(128)
    back = (vae.decode(vae.encode(drawn * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) + 1) / 2
    psnr = -10 * (back - drawn).square().mean(dim=(1, 2, 3)).log10().mean().item()
    read = judge_pictures(back, [held_out.wanted[i] for i in row.tolist()], reader)
    return {"psnr_db": round(psnr, 3), "digits_read": sum(v.digit for v in read) / len(read)}


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Pictures, count: int, path: Path) -> tuple[Tensor, Tensor]:
    """Latent means of pictures of all classes in turn, and their classes."""
    if not path.is_file():
        torch.manual_seed(SEED + 4)
        rows = torch.arange(count, device=pictures.table.device) % len(pictures.table)
        found = []
        for done, part in enumerate(rows.split(256)):
            x = pictures.draw_rows(part)[1] * 2 - 1
            found.append(vae.encode(x).latent_dist.mean.to(torch.bfloat16))
            if done % 40 == 0:
                log(f"encoded {256 * done} of {count} pictures")
        with writing(path) as temporary:
            save_file({"latents": torch.cat(found).contiguous(), "row": rows.contiguous()}, temporary)
    tables = load_file(path)
    return tables["latents"].float(), tables["row"]


class VelocityLoss:
    """Squared error of the predicted v = α·noise − σ·data at logit-normal timesteps, a little on the noisy side.

    v is as well conditioned for pure noise as for clean data, where epsilon and the data themselves are not. Most
    draws fall where the shape of the digit is decided, as in Esser et al. (arXiv 2403.03206); none is reweighted. They
    are stratified over the batch for a steadier mean.
    """

    CENTRE, SPREAD = 0.5, 1.1  # of the timestep's logit

    def __init__(self, device: torch.device) -> None:
        kept = build_scheduler().alphas_cumprod.to(device)
        self.alpha, self.sigma = kept.sqrt(), (1 - kept).sqrt()

    def timesteps(self, batch: int) -> Tensor:
        device, count = self.alpha.device, len(self.alpha)
        share = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
        normal = torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4))
        return (torch.sigmoid(self.CENTRE + self.SPREAD * normal) * count).long().clamp(max=count - 1)

    def __call__(self, denoiser: Callable[[Tensor, Tensor], Tensor], data: Tensor) -> Tensor:
        """denoiser: (noisy latents, timesteps (B,)) -> v. data: (B, C, h, w)."""
        timestep = self.timesteps(len(data))
        alpha, sigma = (part[timestep].view(-1, 1, 1, 1) for part in (self.alpha, self.sigma))
        noise = torch.randn_like(data)
        with autocast(data.device):
            out = denoiser(alpha * data + sigma * noise, timestep)
        return (out.float() - (alpha * noise - sigma * data)).square().mean()


def train_denoiser(
    name: str,
    modules: list[nn.Module],
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    prepared: Prepared,
    args: argparse.Namespace,
) -> list[list[float]]:
    """Trains the modules in place and leaves them with averaged weights, rounded to bfloat16; returns the curve.

    denoiser: (noisy latents, timesteps, classes) -> v; it drops classes for guidance itself.
    """
    device = torch.device(args.device)
    loss_of = VelocityLoss(device)
    # on CPU the fused attention's backward takes longer than everything else in such short sequences
    kernels = [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    state = args.work / f"{name}.state.safetensors"
    trainer = Trainer(modules, args.rate, args.minutes, state, args.muon_rate or None)
    mean = None
    for step in trainer.steps():
        index = torch.randint(len(prepared.latents), (args.batch,))
        data, row = prepared.latents[index].to(device), prepared.row[index].to(device)
        with sdpa_kernel(kernels):
            loss = trainer.update(loss_of(lambda x, t, row=row: denoiser(x, t, row), data))
        mean = loss if mean is None else 0.98 * mean + 0.02 * loss
        if step % 25 == 0:
            trainer.note(mean)
            log(f"{name} {step} ({trainer.progress:.3f}) loss {mean:.5f}")
    trainer.use_average()
    for module in modules:
        round_weights(module.eval(), torch.bfloat16)
    return trainer.curve


def shares(pictures: Tensor, wanted: list[Picture], reader: DigitReader) -> dict[str, float]:
    """Share of pictures (B, 3, H, W) that show what was asked for, for each attribute and for both."""
    read = judge_pictures(pictures, wanted, reader)
    found = {"digit": [v.digit for v in read], "colour": [v.colour for v in read]}
    found["both"] = [v.digit and v.colour for v in read]
    return {name: round(sum(right) / len(right), 4) for name, right in found.items()}


def figures(args: argparse.Namespace, prepared: Prepared, name: str, curve: list) -> dict[str, Any]:
    """What training.json says of how a model was trained."""
    device = torch.device(args.device)
    return {
        "seed": SEED,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": args.threads,
        "minutes": {"autoencoder": args.vae_minutes, name: args.minutes},
        "batch": args.batch,
        "rates": {"adamw": args.rate, "muon": args.muon_rate},
        "latents": args.pictures,
        **prepared.evidence,
        "curves": {"autoencoder": prepared.curve, name: curve},
    }
