"""The parts of `digits-image`: a text-to-image pipeline of the Stable Diffusion classes at a laptop's size."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attar.models.zoo.canvas import SIZE
from attar.models.zoo.picture_parts import LATENT_CHANNELS, LATENT_SIZE, build_scheduler
from attar.models.zoo.pictures import all_pictures

TEXT_TOKENS, TEXT_WIDTH = 16, 128
START, END = "<|startoftext|>", "<|endoftext|>"

GENERATION = {"height": SIZE, "width": SIZE, "num_inference_steps": 50, "guidance_scale": 4.0}


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte pairs, merged to one token for each word of the sentences; other words fall into characters."""
    words = {
        word for picture in all_pictures() for sentence in picture.sentences for word in sentence.split()
    }
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = {START: 0, END: 1}
    for token in [*characters, *(f"{c}</w>" for c in characters)]:
        vocabulary[token] = len(vocabulary)
    merges: dict[tuple[str, str], None] = {}
    # a long word comes first, so that no merge of a short one, such as "re" of red, takes letters out of it
    for word in sorted(words, key=lambda word: (-len(word), word)):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for k in range(1, len(parts)):
            merges["".join(parts[:k]), parts[k]] = None
            vocabulary.setdefault("".join(parts[: k + 1]), len(vocabulary))
    pairs: Any = list(merges)
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=TEXT_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    marks: dict[str, Any] = {
        key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TEXT_TOKENS, projection_dim=TEXT_WIDTH,
        **marks,
    )  # fmt: skip
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    config: dict[str, Any] = dict(
        sample_size=LATENT_SIZE, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 160, 160), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
    )  # fmt: skip
    return UNet2DConditionModel(**config)


def build_pipeline(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, vae: AutoencoderKL, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    scheduler: Any = build_scheduler()
    nothing: dict[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    pipe = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, **nothing)
    pipe.set_progress_bar_config(disable=True)
    return pipe
