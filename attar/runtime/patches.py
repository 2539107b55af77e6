"""Layers that are no linears, in a form that is made of linears, so that all that is known of linears serves them too.

A convolution is a linear over patches: each output pixel is the product of the weight, as a matrix, with the patch of
the input that it looks at. A layer whose input is a concatenation is a sum of layers over its parts.

    conv1 (Conv2d)  ->  conv1 (PatchLinear)  conv1.linear (Linear over C·kh·kw)
    proj (Linear)   ->  proj (SplitLinear)   proj.parts.0, proj.parts.1 (Linears over channel ranges)

Both may be combined: "conv1.linear.parts.0". A layer's name says which form its surroundings have, so a list of names
is all that is needed to bring a dense model into the form that it belongs to: `open_layers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.errors import AttarError

PATCHES, PARTS = ".linear", ".parts."


class PatchLinear(nn.Module):
    """A 2D convolution computed as `linear` over patches: (B, C, H, W) -> (B, out, H', W').

    `linear` maps (B, H'·W', C·kh·kw) -> (B, H'·W', out); what quantizes it quantizes each output pixel's patch on its
    own. It shares the storage of the convolution's weight. The patches are held in memory while it runs: kh·kw times
    the input, over the strides. `weight` and `bias` are read in the convolution's shapes.
    Raises AttarError for a convolution that is none over whole patches (`why_not`).
    """

    linear: nn.Module

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        reason = why_not(conv)
        if reason is not None:
            raise AttarError(f"the convolution cannot become a linear: {reason}")
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding: tuple[int, ...] = tuple(
            conv._reversed_padding_repeated_twice
        )  # left, right, top, bottom
        linear = matrix_form(conv)
        linear.weight = nn.Parameter(conv.weight.detach().flatten(1), conv.weight.requires_grad)
        linear.bias = conv.bias  # type: ignore[assignment]
        self.linear = linear
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return self(x[None])[0]
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        patches = self.patches(x)
        y = self.linear(patches.flatten(1, 2))  # (B, H', W', C·kh·kw) -> (B, H'·W', out)
        y = y.unflatten(1, patches.shape[1:3]).permute(0, 3, 1, 2)  # channels last in memory
        return y if last else y.contiguous()

    def patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H', W', C·kh·kw): what each output pixel sees, channel by channel."""
        if any(self.padding):
            x = F.pad(x, self.padding)
        for axis, size, stride, dilation in zip(
            (2, 3), self.kernel_size, self.stride, self.dilation, strict=True
        ):
            x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return x.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, C, H', W', kh, kw), copied once here

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.linear.weight  # type: ignore[assignment]
        return weight.unflatten(1, (self.in_channels, *self.kernel_size))

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )


class SplitLinear(nn.Module):
    """W x + b as Σ W_k x_k + b over ranges of the input channels: (..., Σ sizes) -> (..., out).

    Each part is a linear, quantized with scales of its own, for its weights and its activations ("shortcut splitting",
    Q-Diffusion, arXiv 2302.04304). The bias is the first part's.
    """

    def __init__(self, linear: nn.Linear, sizes: Sequence[int]) -> None:
        super().__init__()
        if sum(sizes) != linear.in_features or min(sizes) < 1:
            raise AttarError(f"parts of {list(sizes)} channels do not make up {linear.in_features}")
        self.sizes = list(sizes)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.parts = nn.ModuleList()
        for k, weight in enumerate(linear.weight.detach().split(self.sizes, dim=1)):
            part = nn.Linear(self.sizes[k], linear.out_features, bias=False, device="meta")
            part.weight = nn.Parameter(weight.contiguous(), linear.weight.requires_grad)
            part.bias = linear.bias if k == 0 else None  # type: ignore[assignment]
            self.parts.append(part)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = x.split(self.sizes, dim=-1)
        y = self.parts[0](first)
        for part, piece in zip(self.parts[1:], rest, strict=True):  # type: ignore[arg-type]
            y = y + part(piece)
        return y

    @property
    def weight(self) -> Tensor:
        return torch.cat([part.weight for part in self.parts], dim=1)  # type: ignore[misc]

    @property
    def bias(self) -> Tensor | None:
        return self.parts[0].bias  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{self.in_features} = {' + '.join(map(str, self.sizes))} -> {self.out_features}"


def why_not(conv: nn.Conv2d) -> str | None:
    """Why a convolution is no linear over whole patches of its input, or None if it is one."""
    if conv.groups != 1:
        return f"a convolution in {conv.groups} groups"
    if conv.padding_mode != "zeros":
        return f"a convolution with {conv.padding_mode} padding"
    return None


def matrix_form(layer: nn.Conv2d | nn.Linear) -> nn.Linear:
    """A linear of the layer's shape, without values."""
    width = layer.weight[0].numel()
    return nn.Linear(width, layer.weight.shape[0], bias=layer.bias is not None, device="meta")


def open_layers(model: nn.Module, names: Iterable[str], splits: Mapping[str, Sequence[int]]) -> None:
    """Gives `model` the linears that are named and that it has in another form, in place; others are left alone.

    A name that ends in ".linear" below a Conv2d turns that into a PatchLinear. splits: place of a linear, by its name
    in the new form -> channels of each part; it becomes a SplitLinear. Parts of the model may be on the meta device.
    Doing it again changes nothing.
    """
    places = [name.rpartition(PARTS)[0] if PARTS in name else name for name in names]
    for place in dict.fromkeys([*places, *splits]):
        around = place.removesuffix(PATCHES)
        conv = _layer(model, around)
        if around != place and isinstance(conv, nn.Conv2d):
            model.set_submodule(around, PatchLinear(conv))
    for place, sizes in splits.items():
        linear = _layer(model, place)
        if isinstance(linear, nn.Linear):
            model.set_submodule(place, SplitLinear(linear, sizes))


def split_sizes(widths: Mapping[str, int]) -> dict[str, list[int]]:
    """The splits that names speak of. widths: name of a layer -> its input channels; parts in their order."""
    found: dict[str, list[int]] = {}
    for name, width in widths.items():
        place, _, part = name.rpartition(PARTS)
        if place and part.isdigit():
            found.setdefault(place, []).append(width)
    return found


def model_splits(model: nn.Module) -> dict[str, list[int]]:
    """The splits that a model has, by the places of their layers."""
    return {name: m.sizes for name, m in model.named_modules() if isinstance(m, SplitLinear)}


def dense_place(model: nn.Module, name: str) -> str:
    """Where the layer of that name lies in `model`, which has it in its first form."""
    if _layer(model, name) is not None:
        return name
    place = name.rpartition(PARTS)[0] if PARTS in name else name
    return place if _layer(model, place) is not None else place.removesuffix(PATCHES)


def stored_type(layer: str, stored: Mapping[str, torch.dtype], default: torch.dtype) -> torch.dtype:
    """The type that the source has the weight of a layer in. layer: its name in the opened model. stored: types of the
    source's tensors by name; a type of one byte is too narrow for sums, and counts as not known."""
    place = layer.rpartition(PARTS)[0] or layer
    for name in (place, place.removesuffix(PATCHES)):
        found = stored.get(f"{name}.weight")
        if found is not None:
            return found if found.itemsize > 1 else default
    return default


def dense_biases(model: nn.Module) -> dict[str, str]:
    """Name of a bias in an opened model -> its name in the model's first form, where these differ."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, SplitLinear):
            found[f"{path}{PARTS}0.bias"] = f"{path}.bias"
    for path, module in model.named_modules():
        if isinstance(module, PatchLinear):
            inner = f"{path}{PATCHES}"
            split = isinstance(module.linear, SplitLinear)
            found[f"{inner}{PARTS}0.bias" if split else f"{inner}.bias"] = f"{path}.bias"
    return found


def _layer(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
