"""The parts of a model that are compressed one at a time: the blocks of a transformer, the units of a U-Net or of an
autoencoder's decoder.

A U-Net has no list of equal blocks. Its units are those of BRECQ and Q-Diffusion: residual blocks, transformer blocks,
the attentions that stand alone, and what changes the resolution. Those of a decoder are chosen alike.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from attar.errors import AttarError
from attar.models import roles

# names of diffusers' classes, since the same module is declared nowhere as what it is
UNET_UNITS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention", "Downsample2D", "Upsample2D")

DECODER_UNITS = ("ResBlock", "EfficientViTBlock", "DCUpBlock2d")


def is_unet(model: nn.Module) -> bool:
    """Whether the model goes down and up again, as diffusers' U-Nets do."""
    return all(isinstance(getattr(model, name, None), nn.ModuleList) for name in ("down_blocks", "up_blocks"))


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The decoder of an autoencoder; None for any other model."""
    encoder, decoder = (getattr(model, name, None) for name in ("encoder", "decoder"))
    both = isinstance(encoder, nn.Module) and isinstance(decoder, nn.Module)
    return decoder if both and callable(getattr(model, "decode", None)) else None


def find_units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(dotted name, module) of every unit, none inside another, in the order in which they are registered.

    Of a transformer the elements of module lists whose class the model declares as repeated or not to be split; of a
    class that declares nothing, the elements of its own lists that all hold an attention. Of an autoencoder the units
    of its decoder. Raises AttarError when there are none, or when they hold no layer that could be quantized.
    """
    where = type(model).__name__
    if decoder_of(model) is not None:
        found = _units(model, DECODER_UNITS, "decoder.up_blocks.")
        if not found:
            sought = ", ".join(DECODER_UNITS)
            raise AttarError(f"no unit of a decoder found (looked for: {sought})", where=where)
        return found
    unet = is_unet(model)
    found = _units(model, UNET_UNITS) if unet else _blocks(model)
    if not found:
        names = UNET_UNITS if unet else tuple(dict.fromkeys(_declared(model)))
        what = "no unit of a U-Net" if unet else "no list of transformer blocks"
        sought = ", ".join(names) or "attention, as nothing is declared"
        raise AttarError(f"{what} found (looked for: {sought})", where=where)
    if not any(isinstance(m, nn.Linear) for _, unit in found for m in unit.modules()):
        raise AttarError("the transformer blocks hold no linear layers", where=where)
    return found


def _units(model: nn.Module, names: tuple[str, ...], below: str = "") -> list[tuple[str, nn.Module]]:
    """The outermost modules of these classes whose path begins with `below`."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{name}.") for name, _ in found)
        if inside or type(module).__name__ not in names or not path.startswith(below):
            continue
        if any(isinstance(m, (nn.Linear, nn.Conv2d)) for m in module.modules()):
            found.append((path, module))
    return found


def _declared(model: nn.Module) -> list[str]:
    attributes = ("_repeated_blocks", "_no_split_modules")
    return [name for attribute in attributes for name in getattr(model, attribute, None) or ()]


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    declared = _declared(model)

    def is_block(path: str, child: nn.Module) -> bool:
        if declared:
            return type(child).__name__ in declared
        return "." not in path and any(roles.is_attention(m) for m in child.modules())

    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{name}.") for name, _ in found)
        if inside or not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
            continue
        if all(is_block(path, child) for child in module):
            children: Any = module.named_children()
            found += [(f"{path}.{name}", child) for name, child in children]
    return found
