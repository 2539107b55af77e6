"""The training of `digits-video`.

Stages: digit reader, autoencoder, latents, transformer with its text encoder (first on single frames, which cost a
fifth and teach it handwriting, then on clips, which teach it motion), and at last a diffusers folder with the curve and
measured scores. A stage that is done is skipped; a killed one goes on from its last state in the work folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attar.models.zoo import digits_video as parts
from attar.models.zoo.clips import FRAMES, Scene, split_scenes
from attar.models.zoo.judges import DigitReader, judge
from attar.models.zoo.training.common import autocast, ink_weighted_error, log, round_weights
from attar.models.zoo.training.data import SEED, Scenes, handwriting
from attar.models.zoo.training.folder import assemble
from attar.models.zoo.training.reader import train_reader
from attar.models.zoo.training.trainer import Trainer


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60.0, help="transformer on clips")
    parser.add_argument("--image-minutes", type=float, default=16.0, help="transformer on single frames")
    parser.add_argument("--vae-minutes", type=float, default=21.0)
    parser.add_argument("--decoder-minutes", type=float, default=12.0)
    parser.add_argument("--reader-minutes", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=48, help="clips in a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="AdamW")
    parser.add_argument(
        "--muon-rate", type=float, default=0.0, help="Muon for the matrices; 0 uses AdamW for all"
    )
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--clips", type=int, default=30_000)
    parser.add_argument(
        "--stage", choices=["all", "decoder"], default="all", help="all, or up to the decoder only"
    )
    parser.add_argument("--score-prompts", type=int, default=240)


def train(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    torch.manual_seed(SEED)
    args.work.mkdir(parents=True, exist_ok=True)
    scans, labels, held_scans, held_labels = handwriting()
    train_split, held_split = split_scenes()
    scenes = Scenes(scans, labels, train_split, device)
    held_out = Scenes(held_scans, held_labels, held_split, device)
    reader, reader_accuracy = train_reader(scenes, held_out, args)
    vae, vae_curve = train_vae(scenes, args)
    if args.stage == "decoder":  # beside a run that trains the transformer, which finds it done
        train_decoder(vae, scenes, args)
        return
    quality = autoencoder_quality(vae, reader, held_out)
    log(f"autoencoder: {quality}")
    tables = encode_clips(vae, scenes, args.images, args.clips, args.work / "latents.safetensors")
    tokenizer, text_encoder, transformer, curves = train_transformer(tables, scenes, args)
    if distributed.is_initialized() and distributed.get_rank() > 0:
        return  # the first process does the rest
    curves = {"autoencoder": vae_curve, "decoder": train_decoder(vae, scenes, args), **curves}
    quality = autoencoder_quality(vae, reader, held_out)
    log(f"autoencoder: {quality}")
    pipe = parts.build_pipeline(tokenizer, text_encoder, vae, transformer)
    scores = score(pipe, reader, held_split[: args.score_prompts])
    log(f"held-out prompts: {scores}")
    card = {
        "seed": SEED,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "minutes": {
            "autoencoder": args.vae_minutes,
            "decoder": args.decoder_minutes,
            "images": args.image_minutes,
            "clips": args.minutes,
        },
        "batch": args.batch,
        "processes": args.processes,
        "reader_accuracy": round(reader_accuracy, 4),
        "autoencoder": quality,
        "scores": scores,
        "prompts_scored": min(args.score_prompts, len(held_split)),
        "rates": {"adamw": args.rate, "muon": args.muon_rate},
        "latents": {"images": args.images, "clips": args.clips},
        "curves": curves,
    }
    assemble(args.out, pipe.to("cpu"), reader, parts.GENERATION, card, prompt_files(), model_card(card))
    log(f"written to {args.out}")


def ink_windows(clips: Tensor, frames: int, side: int) -> Tensor:
    """Random sub-clips that mostly show ink, (B, 3, F, H, W) -> (B, 3, frames, side, side)."""
    start = torch.randint(0, clips.shape[2] - frames + 1, (1,)).item()
    top, left = (torch.randint(0, clips.shape[-1] - side + 1, (2,))).tolist()
    return clips[:, :, start : start + frames, top : top + side, left : left + side]


def train_vae(scenes: Scenes, args):
    """Autoencoder on short windows: it is convolutional and causal, so what it learns there holds for whole clips."""
    device = scenes.table.device
    vae = parts.build_vae().to(device)
    trainer = Trainer([vae], 2e-3, args.vae_minutes, args.work / "vae.state.safetensors")
    for step in trainer.steps():
        with torch.no_grad():
            # short clips first, which are cheap; then whole ones, in which a colour has to last for all five latents
            short = ((5, 16), (9, 10), (1, 48))[(0, 0, 1, 2)[step % 4]]
            whole = ((17, 6), (17, 6), (17, 6), (1, 48))[step % 4]
            frames, batch = short if trainer.progress < 0.57 else whole
            x = ink_windows(scenes.draw(batch)[1], frames, 24) * 2 - 1
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + (0.5 * posterior.logvar).exp() * torch.randn_like(posterior.mean)
        out = vae.decode(z).sample
        kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar)
        loss = trainer.update(ink_weighted_error(out, x) + 3e-4 * kl.mean())
        if step % 50 == 0:
            trainer.note(loss)
            log(f"autoencoder {step} ({trainer.progress:.2f}) loss {loss:.5f}")
    trainer.use_average()
    return round_weights(vae.eval(), torch.float16), trainer.curve


def train_decoder(vae, scenes: Scenes, args) -> list[list]:
    """Sharpen the decoder for the latents as they are: the encoder, and so the transformer's data, stays fixed."""
    parameters = nn.ModuleList([vae.decoder, vae.post_quant_conv])
    trainer = Trainer([parameters], 1.5e-3, args.decoder_minutes, args.work / "decoder.state.safetensors")
    for step in trainer.steps():
        with torch.no_grad():
            frames, batch, side = ((1, 48, 24), (9, 10, 24), (17, 5, 24), (17, 3, 32))[step % 4]
            x = ink_windows(scenes.draw(batch)[1], frames, side) * 2 - 1
            z = vae.encode(x).latent_dist.mean
            z = z + 0.05 * z.std() * torch.randn_like(z)  # generated latents are not quite encoded ones
        out = vae.decode(z).sample
        loss = trainer.update(ink_weighted_error(out, x, squared=2.0))
        if step % 50 == 0:
            trainer.note(loss)
            log(f"decoder {step} ({trainer.progress:.2f}) loss {loss:.5f}")
    trainer.use_average()
    round_weights(vae, torch.float16)
    return trainer.curve


@torch.no_grad()
def encode_clips(vae, scenes: Scenes, images: int, clips: int, path: Path) -> dict[str, Tensor]:
    """Normalised latent means of frames and of clips, with their scene rows; sets the VAE's latent statistics."""
    if not path.is_file():
        torch.manual_seed(SEED + 3)
        out: dict[str, list[Tensor]] = {"image": [], "image_row": [], "clip": [], "clip_row": []}
        for name, count, frames, batch in (("image", images, 1, 128), ("clip", clips, FRAMES, 16)):
            for done in range(0, count, batch):
                row, x = scenes.draw(batch)
                first = torch.randint(0, x.shape[2] - frames + 1, (1,)).item()
                x = x[:, :, first : first + frames] * 2 - 1
                out[name].append(vae.encode(x).latent_dist.mean.to(torch.bfloat16))
                out[name + "_row"].append(row)
                if done % (batch * 40) == 0:
                    log(f"encoded {done + batch} of {count} {name}s")
        save_file({k: torch.cat(v).contiguous() for k, v in out.items()}, path)
    tables = load_file(path)
    sample = tables["clip"][:4096].float()
    mean, std = sample.mean(dim=(0, 2, 3, 4)), sample.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    shape = (-1, 1, 1, 1)
    return {
        k: (v.float() - mean.view(shape)) / std.view(shape) if v.ndim == 5 else v for k, v in tables.items()
    }


def train_transformer(tables: dict[str, Tensor], scenes: Scenes, args):
    """Flow matching, v = noise - data, with classifier-free dropout and several paddings of the text."""
    device = scenes.table.device
    prompts = [s.prompt for s in scenes.wanted]
    tokenizer = parts.build_tokenizer()
    ids = tokenizer([*prompts, ""], padding=True, return_tensors="pt").input_ids.to(
        device
    )  # last: empty prompt
    torch.manual_seed(SEED + 4)
    text_encoder = parts.build_text_encoder(len(tokenizer)).to(device)
    transformer = parts.build_transformer().to(device)

    # on CPU the fused attention's backward takes longer than everything else in such short sequences
    kernels = [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def loss_of(kind: str, batch: int, tokens: int) -> Tensor:
        index = torch.randint(len(tables[kind]), (batch,))
        data, row = tables[kind][index].to(device), tables[kind + "_row"][index].to(device)
        row = torch.where(torch.rand(batch, device=device) < 0.1, len(prompts), row)
        u = torch.sigmoid(torch.randn(batch, device=device) * 1.2)
        sigma = parts.FLOW_SHIFT * u / (1 + (parts.FLOW_SHIFT - 1) * u)
        noise = torch.randn_like(data)
        s = sigma[:, None, None, None, None]
        with autocast(device):
            text = parts.encode_prompts(text_encoder, ids[row], tokens)
            out = transformer((1 - s) * data + s * noise, sigma * 1000, text, return_dict=False)[0]
        return F.mse_loss(out.float(), noise - data)

    curves = {}
    muon = args.muon_rate or None
    for kind, minutes, batch in (("image", args.image_minutes, 128), ("clip", args.minutes, args.batch)):
        trainer = Trainer(
            [transformer, text_encoder], args.rate, minutes, args.work / f"{kind}.state.safetensors", muon
        )
        mean = None
        for step in trainer.steps():
            # mostly the length that we recommend; sometimes WanPipeline's default of 512, so that a plain call works
            tokens = {5: 128, 11: 512}.get(step % 24, parts.TEXT_TOKENS)
            with sdpa_kernel(kernels):
                loss = trainer.update(loss_of(kind, batch if tokens < 512 else batch // 2, tokens))
            mean = loss if mean is None else 0.98 * mean + 0.02 * loss
            if step % 25 == 0:
                trainer.note(mean)
                log(f"transformer on {kind}s {step} ({trainer.progress:.3f}) loss {mean:.5f}")
        trainer.use_average()
        curves[f"{kind}s"] = trainer.curve
    return (
        tokenizer,
        round_weights(text_encoder.eval(), torch.bfloat16),
        round_weights(transformer.eval(), torch.bfloat16),
        curves,
    )


@torch.no_grad()
def score(pipe, reader: DigitReader, scenes: list[Scene], seed: int = 0, **overrides) -> dict[str, float]:
    """Share of clips that show what their sentence says, for each attribute."""
    settings = {k: v for k, v in parts.GENERATION.items() if k != "fps"} | overrides
    verdicts = []
    for start in range(0, len(scenes), 40):
        some = scenes[start : start + 40]
        generator = torch.Generator().manual_seed(seed + start)
        video = pipe([s.prompt for s in some], output_type="pt", generator=generator, **settings).frames
        verdicts += judge(video.float(), some, reader)
    return {
        k: sum(getattr(v, k) for v in verdicts) / len(verdicts)
        for k in ("digit", "colour", "direction", "speed")
    }


@torch.no_grad()
def autoencoder_quality(vae, reader: DigitReader, held_out: Scenes) -> dict[str, float]:
    torch.manual_seed(SEED + 2)
    row, clips = held_out.draw(64)
    back = (vae.decode(vae.encode(clips * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) + 1) / 2
    psnr = -10 * (back - clips).square().mean(dim=(1, 2, 3, 4)).log10().mean().item()
    read = judge(back.transpose(1, 2), [held_out.wanted[i] for i in row.tolist()], reader)
    return {"psnr_db": round(psnr, 3), "digits_read": sum(v.digit for v in read) / len(read)}


def prompt_files() -> dict[str, list[str]]:
    """Sentences to calibrate with, which were trained on, and to judge with, which were not."""
    found = {}
    for name, scenes in zip(("calibration", "evaluation"), split_scenes(), strict=True):
        order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(SEED)).tolist()
        found[name] = [scenes[i].prompt for i in order[:240]]
    return found


def _curves_of(repeat: dict | None) -> str:
    """Where the losses are, of a model whose own were not kept."""
    if repeat is None:
        return "the losses of this run were not kept"
    right = ", ".join(f"{name} {100 * share:.1f} %" for name, share in repeat["scores"].items())
    return (
        "the losses of this run were not kept, those by step in `training.json` are of a\n"
        f"repeat by the command below in one process, whose model gets {right} right and\n"
        f"whose autoencoder keeps {repeat['autoencoder']['psnr_db']:.1f} dB"
    )


def model_card(card: dict) -> str:
    """README.md of the folder, with the measured figures."""
    scores, minutes = card["scores"], card["minutes"]
    curves = "the losses by step are in `training.json`" if card["curves"] else _curves_of(card.get("repeat"))
    shares = "\n".join(f"| {name} | {100 * share:.1f} % |" for name, share in scores.items())
    return f"""---
pipeline_tag: text-to-video
library_name: diffusers
license: apache-2.0
tags: [attar, text-to-video, toy]
---

# digits-video

A text-to-video pipeline of diffusers' Wan classes (`WanPipeline`, `WanTransformer3DModel`, `AutoencoderKLWan`,
`UMT5EncoderModel`, flow matching) at a size that a laptop runs. It draws one handwritten digit in one of seven colours
that drifts in one of eight directions at one of two speeds: 17 frames of 32x32 pixels. It exists so that every step of
compressing a video diffusion transformer can be watched and measured without a GPU or a download.

    a red seven drifts to the upper left, fast

| part | what |
|---|---|
| transformer | 8 blocks, width 256, 4 heads, feed-forward 1024, patches 1x2x2, 80 tokens a clip |
| autoencoder | 4x in space, 4x in time, 8 latent channels |
| text encoder | UMT5, 2 layers, width 128, its own tokenizer |
| call | height=32, width=32, num_frames=17, max_sequence_length=32, 50 steps, guidance 4 (`generation.json`) |

Data: the handwriting of scikit-learn's `load_digits` (UCI, 1797 scans of 8x8), split by sample: 1437 to train with, 360
for the judges. 240 of the 1120 combinations of digit, colour, direction and speed were never trained on.

Share of {card["prompts_scored"]} such held-out prompts that come out right, 50 steps:

| attribute | right |
|---|---|
{shares}

The digit is judged by a small network that reads {100 * card["reader_accuracy"]:.1f} % of held-out handwriting in such
clips (`judge/`); colour, direction and speed are measured from the pixels. The autoencoder alone keeps
{card["autoencoder"]["psnr_db"]:.1f} dB.

Trained in {minutes["autoencoder"] + minutes["decoder"]:g} minutes (autoencoder), {minutes["images"]:g} (transformer
on frames) and {minutes["clips"]:g} (on clips) on {card["processes"]} process(es) of a {card["device"]}, seed
{card["seed"]}; {curves}. Again with

    python -m attar.models.zoo.train digits-video

Weights are stored in half precision; figures are those of the stored weights, computed in float32.
Limits: it understands its own sentences and nothing else.
"""
