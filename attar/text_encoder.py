"""The compression of a text encoder: weights only, rounded to nearest, layer after layer, without data.

Its linears inside the repeated layers are packed; embeddings, norms and what stands outside stay as they are.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from torch import nn

from attar.errors import AttarError
from attar.losses import mse
from attar.models.source import Source, stored_dtypes
from attar.models.streamed import layer_names
from attar.models.weights import weights_of
from attar.progress import Progress
from attar.quantize.block import quantize_block
from attar.quantize.block_settings import BlockSettings
from attar.quantize.initialize import TransformSettings
from attar.quantize.plain import check_plain
from attar.quantize.plan import LayerPlan, fitting_group, forecast
from attar.recipe import Recipe
from attar.runtime.layers import packed_layers
from attar.stages import TextEncoder
from attar.stored import block_file, read_layers, restore_block, save_block
from attar.workspace import Workspace

_PLAIN = BlockSettings(TransformSettings(scale=False, rotation="none"), weight_clip=False, act_clip=False)


def text_encoders(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's text encoders by component name: `text_encoder`, `text_encoder_2`, …"""
    return {
        name: part
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and isinstance(part, nn.Module)
    }


def plan_text_encoders(pipe: Any, recipe: Recipe) -> dict[str, list[LayerPlan]]:
    """The plan of every linear in the layers of each text encoder; {} where the recipe leaves them as they are.

    Raises AttarError if there is none, or one is compressed already.
    """
    if recipe.text_encoder is None:
        return {}
    found = text_encoders(pipe)
    if not found:
        raise AttarError("the pipeline has no text encoder", where="text_encoder", fix="Leave it out")
    return {name: _plan(name, part, recipe.text_encoder) for name, part in found.items()}


def _plan(component: str, encoder: nn.Module, settings: TextEncoder) -> list[LayerPlan]:
    if packed_layers(encoder):
        raise AttarError(
            "the text encoder is already compressed", where=component, fix="Start from the original"
        )
    check_plain(encoder)
    plans = []
    for unit in layer_names(encoder):
        for path, linear in encoder.get_submodule(unit).named_modules():
            if isinstance(linear, nn.Linear):
                groups, note = fitting_group(linear.in_features, settings.group_size)
                reason = ", ".join(filter(None, ("text encoder: weights only", note)))
                plans.append(
                    LayerPlan(
                        f"{unit}.{path}", f"text.{path.rpartition('.')[2]}", settings.weights, None, reason,
                        linear.in_features, linear.out_features, linear.bias is not None,
                        groups, plain=True,
                    )
                )  # fmt: skip
    if not plans:
        raise AttarError("the text encoder has no repeated layers with linears", where=component)
    return plans


def compress_text_encoder(
    component: str, encoder: nn.Module, plans: list[LayerPlan], workspace: Workspace, progress: Progress
) -> list[str]:
    """Packs the planned linears in place, one layer of the encoder open at a time; finished ones are on disk.

    Returns the names of the layers in the order of their files.
    """
    encoder.requires_grad_(False).eval()
    weights = weights_of(encoder)
    units = [unit for unit in layer_names(encoder) if any(p.name.startswith(f"{unit}.") for p in plans)]
    with progress.task(f"{component}: quantize", len(units)) as advance:
        for index, unit in enumerate(units):
            module, file = encoder.get_submodule(unit), f"{component}/{block_file(index)}"
            if workspace.has(file):
                restore_block(workspace, file, module)
            else:
                inside = {p.name.removeprefix(f"{unit}."): p for p in plans if p.name.startswith(f"{unit}.")}
                with weights.opened(module):
                    outcome = quantize_block(
                        module, inside, lambda call: {}, [], [], _PLAIN, loss=lambda y, target, _: mse(y, target)
                    )  # fmt: skip
                    save_block(workspace, file, outcome.layers, {"block": unit})
            weights.replaced(module, partial(read_layers, workspace, file))
            advance(index + 1, unit)
    return units


def text_encoder_bytes(
    pipe: Any, plans: dict[str, list[LayerPlan]], source: Source
) -> dict[str, tuple[int, int]]:
    """Component -> bytes of its tensors (as stored in the source, packed), as its files will hold them."""
    sizes = {}
    for name, layers in plans.items():
        stored = {} if source.folder is None else stored_dtypes(source.folder / name)
        encoder: Any = text_encoders(pipe)[name]
        state, tied = encoder.state_dict(), set(encoder.all_tied_weights_keys) - set(stored)
        before = {
            key: tensor.numel() * (stored.get(key) or tensor.dtype).itemsize
            for key, tensor in state.items()
            if key not in tied
        }
        after = sum(before.values())
        for plan in layers:
            packed = forecast(plan, _PLAIN.transforms).packed - (2 * plan.out_features if plan.bias else 0)
            after += packed - before[f"{plan.name}.weight"]
        sizes[name] = sum(before.values()), after
    return sizes


def packed_config(source_config: str, quantization_config: dict[str, Any]) -> str:
    """The text of config.json with a quantization config, laid out as transformers does it."""
    content = {**json.loads(source_config), "quantization_config": quantization_config}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
