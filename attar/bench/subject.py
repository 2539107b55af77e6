"""What is measured: one block of each kind of a transformer, dense and packed, with inputs of a real call."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attar.calibration.catch import catch_block_calls
from attar.candidates import in_every_layer
from attar.errors import AttarError
from attar.forecast.architecture import Architecture
from attar.forecast.calls import Latent, transformer_call
from attar.models.adapter import Block, Linear, ModelAdapter
from attar.models.block import BlockCall, run_block
from attar.models.tree import map_tensors
from attar.quantize.block import quantize_block
from attar.recipe import Recipe
from attar.runtime.diffusers_integration import use_kernels
from attar.runtime.step_groups import choose_group
from attar.settings import block_settings, plan_for

IMAGE_MODELS = ("FluxTransformer2DModel", "PixArtTransformer2DModel", "DiTTransformer2DModel")
LAYER_KEYS = ("num_layers", "num_single_layers")  # of a transformer's config: blocks of each kind


@dataclass
class BenchBlock:
    """One kind of block, dense, with random weights of the real shapes and the arguments of a real call.

    count: how many the model has. linears: by their names below the block. attentions: name -> kind.
    """

    kind: str
    count: int
    dense: nn.Module
    call: BlockCall
    outputs: tuple[str | None, ...]
    linears: list[Linear]
    attentions: dict[str, str]

    @property
    def roles(self) -> dict[str, str]:
        """Name of a linear -> role."""
        return {linear.name: linear.role for linear in self.linears}

    def run(self, module: nn.Module) -> dict[str, Tensor]:
        """What the dense block, or another one in its place, makes of the call."""
        return run_block(module, self.call, self.outputs)


def bench_blocks(
    architecture: Architecture,
    latent: Latent,
    text_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> list[BenchBlock]:
    """One block of each kind of the first transformer; no other is ever in memory.

    Raises AttarError where the kinds of blocks cannot be told from the config.
    """
    name, whole = next(iter(architecture.transformers.items()))
    counts = Counter(_kind(block) for block in ModelAdapter.of(whole).blocks)
    with torch.device(device):  # where random weights are made in no time
        short = _shortened(whole).to(device=device, dtype=dtype)
    adapter = ModelAdapter.of(short)
    if [_kind(block) for block in adapter.blocks] != list(counts):
        raise AttarError("the kinds of its blocks cannot be told from the config", where=type(whole).__name__)
    call = _filled(transformer_call(architecture, name, latent, text_tokens), device, dtype)
    found = []
    with torch.no_grad():
        adapter.observe(call)
        for block in adapter.blocks:
            prefix = f"{block.name}."
            caught = catch_block_calls(short, adapter, block.index, [call])[0]
            found.append(
                BenchBlock(
                    _kind(block), counts[_kind(block)], block.module, caught, block.outputs,
                    [replace(x, name=x.name.removeprefix(prefix)) for x in adapter.linears(block)],
                    {x.name.removeprefix(prefix): x.kind for x in adapter.attentions(block)},
                )
            )  # fmt: skip
    return found


def pack_block(block: BenchBlock, recipe: Recipe) -> nn.Module:
    """A packed copy of the block by the recipe's bits and transforms, without learning, which decides nothing about
    speed; its attention and activations are a packed model's. A budget of as many mean bits as the recipe has is timed
    with these in every layer; any other is an AttarError."""
    recipe = in_every_layer(recipe)
    module = copy.deepcopy(block.dense)
    settings = replace(
        block_settings(recipe),
        learning=None,
        gptq_damping=None,
        rounding=None,
        clip_search=False,
        clip_groups=None,
    )
    # of groups of steps the widest bits, which cost no less time than others
    plans = [replace(plan, act_groups=None) for plan in plan_for(recipe, block.linears, [])]

    def run(call: BlockCall) -> dict[str, Tensor]:
        return run_block(module, call, block.outputs)

    with torch.no_grad():
        quantize_block(
            module, {p.name: p for p in plans if not p.skipped}, run, [block.call], [run(block.call)], settings,
            loss=lambda *_: torch.zeros(()), seed="bench",
        )  # fmt: skip
    use_kernels(module)
    return module


def packed_blocks(transformer: nn.Module) -> dict[str, nn.Module]:
    """Kind of block -> the first one of a compressed transformer, in the first of its groups of steps."""
    choose_group(transformer, 0)
    return {_kind(block): block.module for block in reversed(ModelAdapter.of(transformer).blocks)}


def latent_grid(architecture: Architecture, tokens: int) -> Latent:
    """A latent video of that many tokens, as near to a cube as its divisors allow; one frame for image models."""
    transformer: Any = next(iter(architecture.transformers.values()))
    config, kind = transformer.config, type(transformer).__name__
    size = 2 if kind == "FluxTransformer2DModel" else config.get("patch_size", 1)
    patch = (config.get("patch_size_t") or 1, size, size) if isinstance(size, int) else tuple(size)
    frames = 1 if kind in IMAGE_MODELS else _divisor(tokens, round(tokens ** (1 / 3)))
    height = _divisor(tokens // frames, round((tokens // frames) ** 0.5))
    width = tokens // frames // height
    return Latent(frames * patch[0], height * patch[1], width * patch[2])


def _divisor(number: int, limit: int) -> int:
    """The largest divisor up to a limit."""
    return next(k for k in range(max(1, limit), 0, -1) if number % k == 0)


def _shortened(transformer: Any) -> nn.Module:
    """A transformer of the same config with random weights and one block of each kind."""
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    fewer = {key: 1 for key in LAYER_KEYS if config.get(key)}
    return type(transformer).from_config({**config, **fewer}).eval().requires_grad_(False)


def _filled(call: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """A call on the meta device with data: noise, timestep 500, masks that hide nothing."""
    generator = torch.Generator().manual_seed(0)

    def fill(name: str, tensor: Tensor) -> Tensor:
        if name == "timestep":
            return torch.full(tensor.shape, 500, dtype=tensor.dtype, device=device)
        if not tensor.is_floating_point():
            return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
        if name.endswith("_ids"):
            return torch.zeros(tensor.shape, dtype=dtype, device=device)
        kept = torch.float32 if tensor.dtype == torch.float32 else dtype
        return torch.randn(tensor.shape, generator=generator).to(device=device, dtype=kept)

    return {name: map_tensors(value, lambda t, name=name: fill(name, t)) for name, value in call.items()}


def _kind(block: Block) -> str:
    return type(block.module).__name__
