"""Complete tiny pipelines of the real diffusers classes: random weights, tokenizers made in code, no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HunyuanVideoPipeline,
    LTXPipeline,
    PixArtAlphaPipeline,
)
from support import tiny
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

from attar.models.calls import conditioning, latents_only
from attar.runtime.backend import use_backend

VOCABULARY = len(tiny.WORDS) + 3
PROMPTS = ["a red fox runs", "the blue cat sits on snow", "a dog"]


@dataclass
class Case:
    """A pipeline and how to call it: a small generation of a few tokens."""

    make: Callable[[], Any]
    generation: dict[str, Any]
    steps: int = 3
    options: dict[str, Any] = field(default_factory=dict)


def t5() -> T5EncoderModel:
    torch.manual_seed(1)
    sizes = dict(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return T5EncoderModel(T5Config(**sizes)).eval()


def clip() -> CLIPTextModel:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=32, eos_token_id=1, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def llama() -> LlamaModel:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaModel(config).eval()


def image_vae(latent_channels: int, shift: float | None = None) -> AutoencoderKL:
    torch.manual_seed(4)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return AutoencoderKL(
        block_out_channels=(8, 8), **blocks,
        latent_channels=latent_channels, norm_num_groups=2, layers_per_block=1, sample_size=16, shift_factor=shift,
    ).eval()  # fmt: skip


def wan_pipeline() -> Any:
    return tiny.wan_pipeline()


def wan22_pipeline() -> Any:
    return tiny.wan_pipeline(two_stages=True)


def cogvideox_pipeline() -> CogVideoXPipeline:
    torch.manual_seed(5)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=4,
    )  # fmt: skip
    return CogVideoXPipeline(
        tokenizer=tiny.tokenizer(), text_encoder=t5(), vae=vae.eval(), transformer=tiny.cogvideox(),
        scheduler=CogVideoXDDIMScheduler(),
    )  # fmt: skip


def hunyuan_pipeline() -> HunyuanVideoPipeline:
    torch.manual_seed(6)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
        mid_block_add_attention=False,
    )  # fmt: skip
    return HunyuanVideoPipeline(
        text_encoder=llama(), tokenizer=tiny.tokenizer(), transformer=tiny.hunyuan(guidance_embeds=True),
        vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=clip(),
        tokenizer_2=tiny.tokenizer(),
    )  # fmt: skip


def ltx_pipeline() -> LTXPipeline:
    torch.manual_seed(7)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae.eval(), text_encoder=t5(),
        tokenizer=tiny.tokenizer(), transformer=tiny.ltx(),
    )  # fmt: skip


def flux_pipeline() -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=image_vae(2, shift=0.0),
        text_encoder=clip(), tokenizer=tiny.tokenizer(), text_encoder_2=t5(), tokenizer_2=tiny.tokenizer(),
        transformer=tiny.flux(guidance_embeds=True),
    )  # fmt: skip


def pixart_pipeline() -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(
        tokenizer=tiny.tokenizer(), text_encoder=t5(), vae=image_vae(4), transformer=tiny.pixart(),
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


def dit_pipeline() -> DiTPipeline:
    """Class-conditional; its classes are called like the prompts that the other pipelines are given."""
    torch.manual_seed(8)
    labels = {number: prompt for number, prompt in enumerate([*PROMPTS, "a digit, a figure"])}
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = DiTPipeline(tiny.dit(), image_vae(4), scheduler, id2label=labels)  # type: ignore[arg-type]
    pipe.register_to_config(id2label=labels)
    return pipe


# HunyuanVideo cuts the tokens of its own template away; these words need none
_PLAIN = {"template": "{}", "crop_start": 0}

CASES: dict[str, Case] = {
    "wan": Case(wan_pipeline, tiny.GENERATION),
    "wan22": Case(wan22_pipeline, tiny.GENERATION, steps=6),
    "cogvideox": Case(cogvideox_pipeline, dict(height=32, width=48, num_frames=9, max_sequence_length=5)),
    "hunyuan": Case(
        hunyuan_pipeline,
        dict(height=32, width=48, num_frames=9, max_sequence_length=8, prompt_template=_PLAIN),
    ),
    "ltx": Case(ltx_pipeline, dict(height=64, width=96, num_frames=17, max_sequence_length=8)),
    "flux": Case(flux_pipeline, dict(height=16, width=16, max_sequence_length=8)),
    "pixart": Case(
        pixart_pipeline,
        dict(height=16, width=16, max_sequence_length=8, use_resolution_binning=False, clean_caption=False),
    ),
    "dit": Case(dit_pipeline, {}),
}


def make(name: str) -> Any:
    pipe = CASES[name].make()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, name: str, prompt: str = PROMPTS[0], seed: int = 3, **overrides: Any) -> torch.Tensor:
    """The latents of one short generation."""
    case = CASES[name]
    options = {**case.generation, "num_inference_steps": case.steps, **overrides}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), latents_only(pipe) as undecoded:
        made = pipe(
            **conditioning(pipe, prompt), generator=generator, return_dict=False, **undecoded, **options
        )
    return made[0]


def save(
    folder: Path, name: str = "wan", steps: int = 3, prompts: list[str] | None = PROMPTS, pipe: Any = None
) -> Path:
    """A pipeline folder as a user has it, with its generation defaults and calibration prompts."""
    pipe = pipe or make(name)
    pipe.save_pretrained(folder)
    known = ("height", "width", "num_frames", "max_sequence_length")
    defaults = {k: v for k, v in CASES[name].generation.items() if k in known}
    (folder / "generation.json").write_text(
        json.dumps({**defaults, "num_inference_steps": steps, "guidance_scale": 4.0})
    )
    if prompts:
        (folder / "calibration_prompts.txt").write_text("\n".join(prompts) + "\n")
    return folder


def assert_same_model(pipe: Any, again: Any, name: str) -> None:
    """Equal tensors, and equal outputs by the reference.

    The last bit of a float product depends on where its operands lie in memory, and may carry an activation over a
    rounding boundary: rarely in the reference, more often behind a rotation in a kernel.
    """
    for component in ("transformer", "transformer_2"):
        if getattr(pipe, component, None) is not None:
            states = [getattr(p, component).state_dict() for p in (pipe, again)]
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    with use_backend("reference"):
        torch.testing.assert_close(generate(again, name), generate(pipe, name), atol=1e-5, rtol=0)
