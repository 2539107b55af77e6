"""What the toolkit knows of a diffusion model: its blocks, linears, attentions, streams and token grid.

Found from what diffusers already declares (`_repeated_blocks`, `_no_split_modules`), from the names of
layers, and from watching one forward (`ModelAdapter.observe`). Files in `families/` add only what none of
these tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.models import roles
from attar.models.block import BlockCall, signature_of
from attar.models.families import FAMILIES
from attar.models.joint import find_joint_order
from attar.models.linears import Linear, open_linears
from attar.models.tree import map_tensors
from attar.models.units import decoder_of, find_units, is_unet
from attar.models.weights import weights_of
from attar.models.wiring import watch

SECOND_STREAM = ("encoder_hidden_states", "context", "txt", "encoder_hidden_state")


@dataclass(eq=False)
class Block:
    """One transformer block, or one unit of a U-Net or a decoder. `outputs` and `streams` are known once the adapter
    has observed a call."""

    name: str  # "blocks.3"
    module: nn.Module
    index: int
    _outputs: tuple[str | None, ...] = ()
    _streams: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str | None, ...]:
        """The stream that each output is, in order; None for an output that is no stream."""
        return self._observed(self._outputs)

    @property
    def streams(self) -> tuple[str, ...]:
        """The arguments that are carried from block to block."""
        return self._observed(self._streams)

    def _observed(self, value: tuple) -> tuple:
        if not value:
            raise AttarError(
                "the streams of the block are not known yet",
                where=self.name,
                fix="Call adapter.observe with the arguments of one transformer call first",
            )
        return value


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention module of a block; kind is "self", "cross" or "joint" (text and video in one sequence)."""

    name: str
    module: nn.Module
    kind: str


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of one transformer call: a grid of frames x height x width, and the text beside it."""

    frames: int
    height: int
    width: int
    text_tokens: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


class ModelAdapter:
    """Answers what must be known of one transformer, U-Net or autoencoder. Make it with `ModelAdapter.of(transformer)`.

    entry: what a calibration sample is a call of: the model, or an autoencoder's decoder. convolutions: whether these
    count as linears.
    splits: layers whose input is a concatenation, by name -> channels of each part; they count as one layer a part.
    """

    def __init__(self, transformer: nn.Module, blocks: list[Block]) -> None:
        self.transformer = transformer
        self.blocks = blocks
        self.unet = is_unet(transformer)
        decoder = decoder_of(transformer)
        self.entry = transformer if decoder is None else decoder
        self.convolutions = self.unet or decoder is not None
        self.splits: Mapping[str, Sequence[int]] = {}
        self._segments: list[list[Block]] = []
        self._joint_orders: dict[type, tuple[str, ...] | AttarError] = {}

    @classmethod
    def of(cls, transformer: nn.Module) -> ModelAdapter:
        """The adapter of a diffusers transformer, U-Net or autoencoder, found generically (`attar.models.units`).

        Raises AttarError when no blocks are found, or when they hold no linear layer.
        """
        found = find_units(transformer)
        return cls(transformer, [Block(name, unit, k) for k, (name, unit) in enumerate(found)])

    # -- what can be said without running the model

    def attentions(self, block: Block) -> list[Attention]:
        """The attention modules of a block, in order, with their kind."""
        modules = block.module.named_modules(prefix=block.name)
        # a unit of a U-Net may be an attention itself
        found = [(p, m) for p, m in modules if (p != block.name or self.unet) and roles.is_attention(m)]
        takes_text = any(name in signature_of(block.module).parameters for name in SECOND_STREAM)
        if getattr(block.module, "attn2", block) is None:  # text would go there, as in the blocks of DiT
            takes_text = False
        two_streams = takes_text and len(block._streams) != 1  # one, if observed, cannot be joint
        alone = two_streams and len(found) == 1 and not self.unet
        return [Attention(path, m, _attention_kind(path, m, alone)) for path, m in found]

    def linears(self, block: Block) -> list[Linear]:
        """The linear layers of a block with their roles; layers that are already packed are left out.

        Of a U-Net or a decoder also the convolutions, under the names that they have as linears.
        """
        attentions, found = self.attentions(block), []
        for path, module, kept in open_linears(block.module, self.convolutions, self._splits_in(block)):
            name = f"{block.name}.{path}"
            inside = next((a for a in attentions if name.startswith(f"{a.name}.")), None)
            role = roles.convolution_role(block.name, path) if self.convolutions else None
            if inside is not None:
                role = roles.attention_role(name.removeprefix(f"{inside.name}."), inside.kind) or role
            found.append(Linear(name, module, role or roles.block_role(path, module), kept))
        return found

    def _splits_in(self, block: Block) -> dict[str, Sequence[int]]:
        prefix = f"{block.name}."
        return {
            name.removeprefix(prefix): sizes for name, sizes in self.splits.items() if name.startswith(prefix)
        }

    def outside_linears(self) -> list[Linear]:
        """The linear layers that are in no block: embeddings, conditioning, refiners, head."""
        prefixes = tuple(f"{block.name}." for block in self.blocks)
        role = roles.unet_outside_role if self.convolutions else roles.outside_role
        return [
            Linear(path, module, role(path), kept)
            for path, module, kept in open_linears(self.transformer, self.convolutions, {})
            if not path.startswith(prefixes)
        ]

    def token_grid(self, call: Mapping[str, Any]) -> TokenGrid:
        """The token grid of one transformer call, given its keyword arguments.

        Latents are read as (B, C, F, h, w) for videos and (B, C, h, w) for images, divided by the patch size
        of the model's config, unless the family says otherwise. Raises AttarError when the grid cannot be
        told.
        """
        name = type(self.transformer).__name__
        text = call.get("encoder_hidden_states")
        text_tokens = text.shape[1] if isinstance(text, Tensor) else 0
        config: Any = getattr(self.transformer, "config", {})
        try:
            frames, height, width = (
                FAMILIES[name].token_grid(config, call) if name in FAMILIES else _grid(config, call)
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise AttarError("the token grid cannot be told from the call", where=name) from error
        return TokenGrid(frames, height, width, text_tokens)

    # -- what one forward tells

    @property
    def observed(self) -> bool:
        return bool(self._segments)

    def observe(self, call: Mapping[str, Any]) -> None:
        """Watches one forward of the transformer (no gradient) and derives streams, segments and joint order.

        `call`: keyword arguments of `entry`. Does nothing the second time. If the model runs its
        blocks in another order than it registers them, `blocks` is put into the order of execution.
        Raises AttarError when a block does not run exactly once, or its outputs cannot be told apart.
        """
        if self.observed:
            return
        device = weights_of(self.transformer).device
        with evaluating(self.transformer):
            call = map_tensors(dict(call), lambda tensor: tensor.to(device))
            wiring = watch(self.entry, [block.module for block in self.blocks], call)
            blocks = [self.blocks[i] for i in wiring.order]
            for k, block in enumerate(blocks):
                block.index, block._outputs, block._streams = k, wiring.outputs[k], wiring.streams[k]
            self.blocks = blocks
            orders = {cls: self._joint_order(cls, given) for cls, given in wiring.first_calls.items()}
        self._joint_orders = orders
        self._segments = [[blocks[k] for k in segment] for segment in wiring.segments]

    @property
    def segments(self) -> list[list[Block]]:
        """Runs of consecutive blocks through which streams can be carried; see `attar.models.wiring`."""
        if not self._segments:
            self.blocks[0]._observed(())
        return self._segments

    def segment_of(self, block: Block) -> list[Block]:
        """The segment that holds the block."""
        return next(segment for segment in self.segments if any(b is block for b in segment))

    def main_stream(self, block: Block) -> str:
        """The stream whose tokens are the grid; where there is another, it holds the text."""
        return next((name for name in block.streams if name not in SECOND_STREAM), block.streams[0])

    def joint_order(self, block: Block) -> tuple[str, ...]:
        """Order of the streams in the block's joint attention sequence, e.g. ("encoder_hidden_states",
        "hidden_states") for CogVideoX; ("hidden_states",) where attention is over one stream.

        Found by disturbing one stream after the other (`attar.models.joint`). Raises AttarError if that
        failed.
        """
        block._observed(block._outputs)
        order = self._joint_orders[type(block.module)]
        if isinstance(order, AttarError):
            raise order
        return order

    def _joint_order(self, cls: type, given: Mapping[str, Any]) -> tuple[str, ...] | AttarError:
        block = next(b for b in self.blocks if type(b.module) is cls)
        joint = [a.module for a in self.attentions(block) if a.kind == "joint"]
        if not joint or len(block.streams) < 2:
            return block.streams[:1]
        streams = {name: given[name] for name in block.streams}
        rest = {name: value for name, value in given.items() if name not in streams}
        try:
            return find_joint_order(block.module, BlockCall(streams, rest), joint[0])
        except AttarError as error:  # only those who ask for the order need it
            return error


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No gradient and evaluation mode inside; each module's own mode is restored after."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True


def _grid(config: Mapping[str, Any], call: Mapping[str, Any]) -> tuple[int, int, int]:
    patch, size = config["patch_size"], call["hidden_states"].shape[2:]
    if isinstance(patch, int):
        patch = (config.get("patch_size_t") or 1, patch, patch)
    frames, height, width = size if len(size) == 3 else (1, *size)
    patch_t, patch_h, patch_w = (1, *patch)[-3:]
    return frames // patch_t, height // patch_h, width // patch_w


def _attention_kind(path: str, module: nn.Module, alone_with_text: bool) -> str:
    if isinstance(getattr(module, "add_q_proj", None), nn.Module):
        return "joint"
    if getattr(module, "is_cross_attention", False):
        return "cross"
    if alone_with_text:  # the block is given text and has no other place to look at it
        return "joint"
    if hasattr(module, "is_cross_attention"):
        return "self"
    last = path.split(".")[-1]
    return "cross" if last == "attn2" or "cross" in last else "self"
