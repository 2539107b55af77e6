"""The linear layers of a part of a model, and the layers that quantization sees as linears."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from attar.runtime.patches import PARTS, PATCHES, matrix_form, why_not


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer: its full dotted name from the transformer, the module, and what it is for.

    Of a layer that becomes linear (attar.runtime.patches) the name is the one it gets then, and the module has its
    shape only. kept: why it is left as it is, whatever a recipe says.
    """

    name: str
    module: nn.Linear
    role: str
    kept: str | None = None


def open_linears(
    module: nn.Module, convolutions: bool, splits: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, nn.Linear, str | None]]:
    """(path, linear, why it is kept) of all layers that are not packed yet, in the order of the modules.

    convolutions: whether those count too. splits: path of a layer -> the channels of each part of its input.
    """
    names = Counter(id(m) for _, m in module.named_modules(remove_duplicate=False)) if convolutions else {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not getattr(layer, "is_attar_packed", False):
            place, form, kept, area = path, layer, None, 1
        elif convolutions and isinstance(layer, nn.Conv2d):
            kept = why_not(layer) or ("a convolution of several names" if names[id(layer)] > 1 else None)
            place, form = path if kept else f"{path}{PATCHES}", matrix_form(layer)
            area = layer.kernel_size[0] * layer.kernel_size[1]
        else:
            continue
        if path not in splits or kept:
            yield place, form, kept
            continue
        for k, channels in enumerate(splits[path]):
            bias = form.bias is not None and k == 0
            yield (
                f"{place}{PARTS}{k}",
                nn.Linear(channels * area, form.out_features, bias, device="meta"),
                None,
            )
