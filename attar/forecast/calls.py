"""How each family's transformer, decoder and text encoder are called for a video of a given size: tensors without data.

Tensors have the shapes that the diffusers pipelines give them, for one branch of guidance, on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attar.errors import AttarError
from attar.forecast.architecture import Architecture

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """A video in pixels and frames, and the length of its text in tokens."""

    width: int
    height: int
    frames: int
    text_tokens: int


@dataclass(frozen=True)
class Latent:
    """A latent video: F frames of h x w."""

    frames: int
    height: int
    width: int


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def latent_of(architecture: Architecture, size: Size) -> Latent:
    """The latent grid of a video.

    Raises AttarError when width or height is no multiple of the autoencoder's factor times the patch, or when a video
    model with a causal autoencoder is asked for other than factor·k + 1 frames.
    """
    space, time = _factors(architecture)
    patch = _patch(next(iter(architecture.transformers.values())))
    for name, value in (("width", size.width), ("height", size.height)):
        if value % (space * patch):
            raise AttarError(
                f"the {name} {value} is not divisible by {space * patch}",
                where="--resolution",
                fix=f"Try {max(1, round(value / (space * patch))) * space * patch}",
            )
    if time is None and size.frames != 1:
        raise AttarError("the model makes images, so there is one frame", where="--frames", fix="Give 1")
    if time is not None and (size.frames - 1) % time:
        below = (size.frames - 1) // time * time + 1
        raise AttarError(
            f"{size.frames} frames do not fit the autoencoder, which takes {time}k + 1",
            where="--frames",
            fix=f"Try {below} or {below + time}",
        )
    frames = 1 if time is None else (size.frames - 1) // time + 1
    return Latent(frames, size.height // space, size.width // space)


def fixed_side(architecture: Architecture) -> int | None:
    """Pixels of a side of the square images of a class-conditional model, which is asked for no size; else None."""
    transformer: Any = next(iter(architecture.transformers.values()))
    if type(transformer).__name__ != "DiTTransformer2DModel":
        return None
    return transformer.config.sample_size * _factors(architecture)[0]


def makes_images(architecture: Architecture) -> bool:
    """Whether the autoencoder knows no time, so that there is one frame."""
    return type(architecture.vae).__name__ == "AutoencoderKL"


def transformer_call(
    architecture: Architecture, name: str, latent: Latent, text_tokens: int
) -> dict[str, Any]:
    """Keyword arguments of one forward of a transformer. Raises AttarError for a class whose call is not known."""
    transformer = architecture.transformers[name]
    family = type(transformer).__name__
    if family not in CALLS:
        raise AttarError(
            "how this transformer is called is not known", where=family, fix=f"Known: {', '.join(CALLS)}"
        )
    return CALLS[family](transformer.config, latent, text_tokens, architecture.pipeline)


def decode(vae: Any, latent: Latent) -> Callable[[], Any]:
    """A function that decodes a whole latent video, untiled."""
    channels = getattr(vae.config, "z_dim", None) or vae.config.latent_channels
    grid = (latent.height, latent.width)
    shape = grid if type(vae).__name__ == "AutoencoderKL" else (latent.frames, *grid)
    return lambda: vae.decode(empty(1, channels, *shape))


def encode(text_encoder: Any, tokens: int) -> tuple[int, Callable[[], Any]]:
    """(tokens that fit, a function that encodes one prompt of that length)."""
    tokens = min(tokens, getattr(text_encoder.config, "max_position_embeddings", tokens))
    ids = empty(1, tokens, dtype=torch.long)
    return tokens, lambda: text_encoder(input_ids=ids)


def _factors(architecture: Architecture) -> tuple[int, int | None]:
    """(pixels to a latent, frames to a latent frame or None for images)."""
    vae: Any = architecture.vae
    if vae is None:
        raise AttarError("the pipeline has no autoencoder (vae)", where=architecture.name)
    config = vae.config
    if makes_images(architecture):
        return 2 ** (len(config.block_out_channels) - 1), None
    own = vars(vae)  # not getattr: diffusers would look into the config and warn
    space = own.get("spatial_compression_ratio") or 2 ** (len(config.get("block_out_channels", ())) - 1)
    keys = ("temporal_compression_ratio", "scale_factor_temporal")
    time = next((place[k] for place in (own, config) for k in keys if place.get(k)), None)
    if not time or space < 1:
        raise AttarError("the compression of the autoencoder cannot be told", where=type(vae).__name__)
    return int(space), int(time)


def _patch(transformer: Any) -> int:
    if type(transformer).__name__ == "FluxTransformer2DModel":
        return 2  # the pipeline packs 2 x 2 latents into one token
    patch = transformer.config.patch_size
    return int(patch if isinstance(patch, int) else patch[-1])


def _wan(c: Any, z: Latent, text: int, pipeline: Any) -> dict[str, Any]:
    tokens = z.frames * (z.height // c.patch_size[1]) * (z.width // c.patch_size[2])
    # Wan 2.2 5B gives every token a timestep of its own
    steps = (1, tokens) if pipeline.get("expand_timesteps") else (1,)
    return dict(
        hidden_states=empty(1, c.in_channels, z.frames, z.height, z.width),
        timestep=empty(*steps, dtype=torch.float32),
        encoder_hidden_states=empty(1, text, c.text_dim),
    )


def _hunyuan(c: Any, z: Latent, text: int, pipeline: Any) -> dict[str, Any]:
    return dict(
        hidden_states=empty(1, c.in_channels, z.frames, z.height, z.width),
        timestep=empty(1, dtype=torch.long),
        encoder_hidden_states=empty(1, text, c.text_embed_dim),
        encoder_attention_mask=empty(1, text, dtype=torch.long),
        pooled_projections=empty(1, c.pooled_projection_dim),
        guidance=empty(1) if c.guidance_embeds else None,
    )


def _cogvideox(c: Any, z: Latent, text: int, pipeline: Any) -> dict[str, Any]:
    patch_t = c.patch_size_t or 1
    frames = -(-z.frames // patch_t) * patch_t  # 1.5 pads the latent frames
    tokens = frames // patch_t * (z.height // c.patch_size) * (z.width // c.patch_size)
    angles = empty(tokens, c.attention_head_dim, dtype=torch.float32)
    return dict(
        hidden_states=empty(1, frames, c.in_channels, z.height, z.width),
        timestep=empty(1, dtype=torch.long),
        encoder_hidden_states=empty(1, text, c.text_embed_dim),
        image_rotary_emb=(angles, angles) if c.use_rotary_positional_embeddings else None,
        ofs=empty(1) if c.ofs_embed_dim else None,
    )


def _ltx(c: Any, z: Latent, text: int, pipeline: Any) -> dict[str, Any]:
    return dict(
        hidden_states=empty(1, z.frames * z.height * z.width, c.in_channels),
        timestep=empty(1),
        encoder_hidden_states=empty(1, text, c.caption_channels),
        encoder_attention_mask=empty(1, text, dtype=torch.long),
        num_frames=z.frames, height=z.height, width=z.width, rope_interpolation_scale=(1.0, 1.0, 1.0),
    )  # fmt: skip


def _flux(c: Any, z: Latent, text: int, pipeline: Any) -> dict[str, Any]:
    tokens = (z.height // 2) * (z.width // 2)
    return dict(
        hidden_states=empty(1, tokens, c.in_channels),
        timestep=empty(1),
        guidance=empty(1) if c.guidance_embeds else None,
        pooled_projections=empty(1, c.pooled_projection_dim),
        encoder_hidden_states=empty(1, text, c.joint_attention_dim),
        txt_ids=empty(text, 3),
        img_ids=empty(tokens, 3),
    )


def _pixart(c: Any, z: Latent, text: int, pipeline: Any) -> dict[str, Any]:
    more = dict(resolution=empty(1, 2), aspect_ratio=empty(1, 1)) if c.use_additional_conditions else None
    return dict(
        hidden_states=empty(1, c.in_channels, z.height, z.width),
        timestep=empty(1, dtype=torch.long),
        encoder_hidden_states=empty(1, text, c.caption_channels),
        added_cond_kwargs=more or dict(resolution=None, aspect_ratio=None),
    )


def _dit(c: Any, z: Latent, text: int, pipeline: Any) -> dict[str, Any]:
    return dict(
        hidden_states=empty(1, c.in_channels, z.height, z.width),
        timestep=empty(1, dtype=torch.long),
        class_labels=empty(1, dtype=torch.long),
    )


CALLS: dict[str, Callable[[Any, Latent, int, Any], dict[str, Any]]] = {
    "WanTransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LTXVideoTransformer3DModel": _ltx,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
}

# tokens that a family pads its prompts to, where the folder does not say
TEXT_TOKENS = {
    "WanTransformer3DModel": 512, "HunyuanVideoTransformer3DModel": 256, "CogVideoXTransformer3DModel": 226,
    "LTXVideoTransformer3DModel": 128, "FluxTransformer2DModel": 512, "PixArtTransformer2DModel": 120,
    "DiTTransformer2DModel": 0,
}  # fmt: skip

# families whose guidance scale is an input of the transformer, or that have none: one branch a step
ONE_BRANCH = {"FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"}


def text_length(architecture: Architecture, given: int | None = None) -> int:
    """Tokens of the text: the given number, else the model's, else its family's. Raises AttarError without any."""
    family = type(next(iter(architecture.transformers.values()))).__name__
    text = given or architecture.default.get("text_tokens") or TEXT_TOKENS.get(family)
    if text is None:
        raise AttarError("the length of the text is not known", where=family, fix="Add --text-tokens N")
    return text
