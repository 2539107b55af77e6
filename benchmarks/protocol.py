"""How one cell is measured: always paired with full precision, on the same prompts and the same noise."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attar.calibration.catch import catch_block_calls
from attar.calibration.store import TraceStore
from attar.calibration.trace import trace_pipeline
from attar.evaluate.fidelity import latent_error, psnr, ssim
from attar.evaluate.frechet import frechet_distance
from attar.losses import temporal_distillation
from attar.models.adapter import ModelAdapter, evaluating
from attar.models.attention_mass import attention_mass
from attar.models.block import BlockCall, run_block
from attar.models.source import Source, load_pipeline
from attar.models.zoo.clips import Scene, split_scenes
from attar.models.zoo.judges import DigitReader, judge
from attar.quantize.batching import concatenate_calls
from attar.runtime.step_groups import choose_group, step_groups_of
from benchmarks.outliers import plant_outliers

ATTRIBUTES = ("digit", "colour", "direction", "speed")
HELD_OUT_PROMPTS, HELD_OUT_STEPS = 2, 8


def evaluation_scenes(count: int) -> list[Scene]:
    """Held-out scenes in a fixed shuffled order, so that a few of them already cover digits and directions."""
    held_out = split_scenes()[1]
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(5)).tolist()
    return [held_out[i] for i in order[:count]]


@torch.no_grad()
def sample(
    pipe: Any, prompts: Sequence[str], call: dict[str, Any], seed: int, batch: int = 20
) -> tuple[Tensor, Tensor]:
    """(final latents (B, C, F, h, w), videos (B, F, 3, H, W) in [0, 1]); prompt i has noise of its own."""
    latents, videos = [], []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        noise = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(some))]
        final = pipe(some, generator=noise, output_type="latent", **call).frames
        latents.append(final.float())
        videos.append(decode(pipe, final))
    return torch.cat(latents), torch.cat(videos)


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Latents of a Wan pipeline -> videos (B, F, 3, H, W) in [0, 1]."""
    vae = pipe.vae
    mean, std = (
        torch.tensor(v, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    video = vae.decode(latents.to(vae.dtype) * std + mean, return_dict=False)[0]
    return pipe.video_processor.postprocess_video(video, output_type="pt").float()


@dataclass
class HeldOut:
    """Full-precision inputs and outputs of every block on samples that no method calibrates on."""

    calls: list[list[BlockCall]]  # by block
    targets: list[list[dict[str, Tensor]]]
    masses: list[list[dict[str, Tensor]]]  # the attention that each token receives, stream -> (B, N)
    timesteps: list[Tensor]  # of the samples


@dataclass
class Reference:
    """What full precision makes of the first held-out scenes."""

    scenes: list[Scene]
    latents: Tensor
    videos: Tensor
    accuracy: dict[str, list[bool]]


class Bench:
    """Everything that the cells of one seed share: traces, held-out block data, full-precision videos.

    outliers: of the model with planted outlier channels instead of the model itself.
    """

    def __init__(
        self, source: Source, folder: Path, seed: int, steps: int | None, outliers: bool = False
    ) -> None:
        self.source, self.seed, self.outliers = source, seed, outliers
        self.folder = (folder / "outliers" if outliers else folder) / f"seed-{seed}"
        self.call = source.call_arguments(num_inference_steps=steps)
        self.steps = int(self.call["num_inference_steps"])
        assert source.folder is not None
        self.reader = DigitReader.load(source.folder)
        self.store = TraceStore(self.folder / "trace")
        self._references: dict[int, Reference] = {}
        pipe = self.load()
        self._trace(pipe)
        self.held_out = self._held_out(pipe)

    def load(self) -> Any:
        """The full-precision pipeline."""
        pipe = load_pipeline(self.source)
        if self.outliers:
            plant_outliers(pipe.transformer)
        return pipe

    def _trace(self, pipe: Any) -> None:
        options = {k: v for k, v in self.call.items() if k not in ("num_inference_steps", "guidance_scale")}
        pool = self.source.prompts
        shift = (10 * self.seed) % (len(pool) - 9)
        self.prompts = pool[shift : shift + 10]
        arguments = {
            "steps": self.steps,
            "guidance_scale": self.call.get("guidance_scale"),
            "generation": options,
        }
        trace_pipeline(pipe, self.prompts, self.store, seed=1000 * self.seed, **arguments)
        others = [scene.prompt for scene in evaluation_scenes(240)[-HELD_OUT_PROMPTS:]]
        self.other = TraceStore(self.folder / "held-out")
        trace_pipeline(pipe, others, self.other, seed=1000 * self.seed + 500, **arguments)

    def _held_out(self, pipe: Any) -> HeldOut:
        transformer = pipe.transformer
        adapter = ModelAdapter.of(transformer)
        chosen = [
            self.other.calls("transformer", p, round(k * (self.steps - 1) / (HELD_OUT_STEPS - 1)))
            for p in range(HELD_OUT_PROMPTS)
            for k in range(HELD_OUT_STEPS)
        ]
        found = HeldOut([], [], [], [branches[0]["timestep"] for branches in chosen])
        calls: list[BlockCall] = []
        for branches in chosen:
            calls.append(concatenate_calls(catch_block_calls(transformer, adapter, 0, branches)))
        with evaluating(transformer):
            for block in adapter.blocks:
                targets, masses = [], []
                for call in calls:
                    with attention_mass(adapter, block) as mass:
                        targets.append(run_block(block.module, call, block.outputs))
                    masses.append(mass.per_stream())
                found.calls.append(calls)
                found.targets.append(targets)
                found.masses.append(masses)
                calls = [call.with_streams(target) for call, target in zip(calls, targets, strict=True)]
        self.outputs = [block.outputs for block in adapter.blocks]
        self.video = [adapter.main_stream(block) for block in adapter.blocks]
        self.frames = adapter.token_grid(chosen[0][0]).frames
        return found

    def reference(self, prompts: int) -> Reference:
        """Full precision on the first held-out scenes, generated when it is first asked for."""
        if prompts not in self._references:
            scenes = evaluation_scenes(prompts)
            pipe = self.load()
            latents, videos = sample(pipe, [scene.prompt for scene in scenes], self.call, self.seed)
            accuracy = self._accuracy(videos, scenes)
            self._references[prompts] = Reference(scenes, latents, videos, accuracy)
        return self._references[prompts]

    def _accuracy(self, videos: Tensor, scenes: list[Scene]) -> dict[str, list[bool]]:
        verdicts = judge(videos, scenes, self.reader)
        found = {name: [getattr(v, name) for v in verdicts] for name in ATTRIBUTES}
        return {**found, "all": [all(row) for row in zip(*found.values(), strict=True)]}

    @torch.no_grad()
    def block_errors(self, transformer: Any) -> dict[str, list[float]]:
        """Held-out error of every block, relative to the block's own update, on full-precision inputs.

        Over all tokens, over the tenth of them that receives most attention, and over the half that receives least.
        Beside them the divergence of the frames' similarities, Q-VDiT's temporal loss.
        """
        names = ("block_errors", "most_attended", "least_attended", "temporal")
        found: dict[str, list[float]] = {name: [] for name in names}
        held, groups = self.held_out, step_groups_of(transformer)
        for k, block in enumerate(ModelAdapter.of(transformer).blocks):
            rows = []
            samples = zip(held.calls[k], held.targets[k], held.masses[k], held.timesteps, strict=True)
            for call, target, mass, timestep in samples:
                if groups is not None:
                    choose_group(block.module, groups.group(timestep))
                made = run_block(block.module, call, self.outputs[k])
                error, update = (_by_token(made, target), _by_token(call.streams, target))  # (B, N)
                order = torch.cat([mass[name] for name in target], dim=1).argsort(dim=1, descending=True)
                count = order.shape[1]
                places = {
                    "block_errors": order,
                    "most_attended": order[:, : max(1, count // 10)],
                    "least_attended": order[:, count - count // 2 :],
                }
                row = {
                    n: (error.gather(1, p).sum() / update.gather(1, p).sum()).item()
                    for n, p in places.items()
                }
                video = self.video[k]
                temporal = temporal_distillation(made[video], target[video], self.frames)
                rows.append({**row, "temporal": temporal.item()})
            for name, errors in found.items():
                errors.append(sum(row[name] for row in rows) / len(rows))
        return found

    def measure(self, pipe: Any, prompts: int) -> dict[str, Any]:
        """All figures of a compressed pipeline. prompts: held-out videos, 0 for block errors alone."""
        figures: dict[str, Any] = self.block_errors(pipe.transformer)
        return {**figures, **self.measure_videos(pipe, prompts)} if prompts else figures

    def measure_videos(self, pipe: Any, prompts: int) -> dict[str, Any]:
        """What can be said of any pipeline: how close its videos are to full precision's, and what they show."""
        reference = self.reference(prompts)
        started = time.time()
        latents, clips = sample(pipe, [scene.prompt for scene in reference.scenes], self.call, self.seed)
        return {
            "latent_error": latent_error(reference.latents, latents).tolist(),
            "psnr": psnr(reference.videos, clips).tolist(),
            "ssim": ssim(reference.videos, clips).tolist(),
            "frechet": frechet_distance(*map(self.reader.describe, (reference.videos, clips))),
            "accuracy": _shares(self._accuracy(clips, reference.scenes)),
            "reference_accuracy": _shares(reference.accuracy),
            "prompts": prompts,
            "sampling_seconds": round(time.time() - started, 1),
        }


def _by_token(streams: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """Squared difference of every token, (B, N), the streams one after the other."""
    return torch.cat([(streams[n].float() - t.float()).square().sum(-1) for n, t in target.items()], dim=1)


def _shares(accuracy: dict[str, list[bool]]) -> dict[str, float]:
    return {name: sum(right) / len(right) for name, right in accuracy.items()}
