"""Equivalent transforms of a linear layer: what is applied to the activation and undone in the weight.

    x Wᵀ = [x T] [W T^{-T}]ᵀ,    x̃ = x T  at run time,    W̃ = W T^{-T}  once, offline

(FlatQuant, SmoothQuant, QuaRot.) Several transforms compose in the order in which they are listed: the first
one acts on x first. Run-time arithmetic is float32 (float64 for a float64 input), the weight side float64.

A channel shift is no matrix: (x - z) Wᵀ + (b + W z) = x Wᵀ + b. It leaves the weight, and the layer's bias has W z.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.runtime.block_rotations import BlockRotations
from attar.runtime.hadamard import base_order, hadamard_base, walsh_hadamard
from attar.runtime.reference import wide
from attar.runtime.transform import Transform, check_invertible, float32, half, inverse, only


class ChannelShift(Transform):
    """x - z for each channel (Outlier Suppression+, arXiv 2304.09145, eq. 2). `shift` z (d,), in half precision.

    Comes before every other transform. Nothing is undone in the weight: who shifts adds W z to the layer's bias.
    """

    kind = "channel_shift"
    names = ("shift",)
    shift: Tensor

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        if not shift.is_meta and not bool(torch.isfinite(shift).all()):
            raise AttarError("a channel shift must be finite", where="ChannelShift")
        self.register_buffer("shift", half(shift).reshape(-1).contiguous())

    @classmethod
    def from_config(cls, config: dict[str, Any], d: int, device: Any = "meta") -> ChannelShift:
        only(config, "kind")
        return cls(torch.zeros(d, device=device))

    @staticmethod
    def activation_side(x: Tensor, *operands: Tensor) -> Tensor:
        (shift,) = operands
        x = wide(x)
        return x - shift.to(x.dtype)

    def weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return weight.to(dtype)

    def inverse_weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return weight.to(dtype)


class ChannelScale(Transform):
    """Per-channel scaling, T = diag(1/c): x / c and W · c (SmoothQuant, eq. 3). `scale` c (d,), positive."""

    kind = "channel_scale"
    names = ("scale",)
    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", float32(scale).reshape(-1))
        self.check()

    def check(self) -> None:
        if not self.scale.is_meta and not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise AttarError("a channel scale must be finite and positive", where="ChannelScale")

    @classmethod
    def from_config(cls, config: dict[str, Any], d: int, device: Any = "meta") -> ChannelScale:
        only(config, "kind")
        return cls(torch.ones(d, device=device))

    @staticmethod
    def activation_side(x: Tensor, *operands: Tensor) -> Tensor:
        (scale,) = operands
        x = wide(x)
        return x / scale.to(x.dtype)

    def weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return weight.to(dtype) * self.scale.to(dtype)

    def inverse_weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return weight.to(dtype) / self.scale.to(dtype)


class Hadamard(Transform):
    """Randomised Hadamard rotation, T = diag(signs) · Hᵀ / √block (QuaRot).

    d = K·2^m gives one rotation of the whole width. For other d, H is block-diagonal with the largest
    power-of-two block that divides d. `signs` (d,) of ±1; `order` is K, `block` the width of one H.
    """

    kind = "hadamard"
    names = ("signs", "base")
    signs: Tensor
    base: Tensor | None

    def __init__(self, signs: Tensor, order: int | None = None, block: int | None = None) -> None:
        super().__init__()
        d = signs.numel()
        if block is None:
            whole = base_order(d)
            block = d if whole is not None else d & -d
        order = base_order(block) if order is None else order
        if (
            order is None
            or order < 1
            or block < 2
            or d % block
            or block % order
            or (block // order).bit_count() != 1
        ):
            raise AttarError(
                f"no Hadamard rotation of width {d} (block {block}, base order {order})",
                fix="Use a Kronecker or dense rotation for this layer",
            )
        _check_signs(signs)
        self.block, self.order = block, order
        self.register_buffer("signs", signs.to(torch.int8).reshape(-1))
        # Stored with the checkpoint (K² bytes), so that a file never depends on how a table is built.
        base = hadamard_base(order).to(signs.device) if order > 1 else None
        self.register_buffer("base", base)

    def check(self) -> None:
        _check_signs(self.signs)
        if self.base is not None:
            _check_signs(self.base)

    @classmethod
    def random(
        cls, d: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Hadamard:
        """Hadamard rotation of width d with random signs drawn from `generator`."""
        where = generator.device if generator is not None else None
        signs = torch.randint(0, 2, (d,), generator=generator, device=where) * 2 - 1
        return cls(signs.to(device) if device is not None else signs)

    @classmethod
    def from_config(cls, config: dict[str, Any], d: int, device: Any = "meta") -> Hadamard:
        only(config, "kind", "order", "block")
        signs = torch.ones(d, dtype=torch.int8, device=device)
        return cls(signs, config.get("order"), config.get("block"))

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "order": self.order, "block": self.block}

    def operands(self) -> list[Tensor]:
        """signs (d / block, block), whose shape tells the block, and the base (order, order)."""
        base = self.signs.new_ones(1, 1) if self.base is None else self.base
        return [self.signs.view(-1, self.block), base]

    @staticmethod
    def activation_side(x: Tensor, *operands: Tensor) -> Tensor:
        signs, base = operands
        x = wide(x)
        return _rotate(x * signs.to(x.dtype).flatten(), base, signs.shape[1])

    def weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.activation_side(weight.to(dtype), *self.operands())

    def inverse_weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        base = self.operands()[1]
        return _rotate(weight.to(dtype), base.T, self.block) * self.signs.to(dtype)


class Kronecker(Transform):
    """T = left ⊗ right with left (l, l), right (r, r), d = l·r: n·d·(l + r) multiplications (FlatQuant)."""

    kind = "kronecker"
    names = ("left", "right")
    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        check_invertible(left, "Kronecker.left")
        check_invertible(right, "Kronecker.right")
        self.register_buffer("left", float32(left))
        self.register_buffer("right", float32(right))

    @classmethod
    def from_config(cls, config: dict[str, Any], d: int, device: Any = "meta") -> Kronecker:
        only(config, "kind", "left", "right")
        left, right = config.get("left", 0), config.get("right", 0)
        if left < 1 or left * right != d:
            raise AttarError(f"a Kronecker transform of {left} x {right} does not fit a layer of width {d}")
        return cls(torch.eye(left, device=device), torch.eye(right, device=device))

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "left": self.left.shape[0], "right": self.right.shape[0]}

    @staticmethod
    def activation_side(x: Tensor, *operands: Tensor) -> Tensor:
        left, right = operands
        x = wide(x)
        return _apply_kronecker(x, left.to(x.dtype), right.to(x.dtype))

    def weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        left, right = inverse(self.left).T.to(dtype), inverse(self.right).T.to(dtype)
        return _apply_kronecker(weight.to(dtype), left, right)

    def inverse_weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return _apply_kronecker(weight.to(dtype), self.left.T.to(dtype), self.right.T.to(dtype))


class Dense(Transform):
    """T = an invertible matrix (d, d): the most general transform and the dearest, n·d² multiplications."""

    kind = "dense"
    names = ("matrix",)
    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        check_invertible(matrix, "Dense")
        self.register_buffer("matrix", float32(matrix))

    @classmethod
    def from_config(cls, config: dict[str, Any], d: int, device: Any = "meta") -> Dense:
        only(config, "kind")
        return cls(torch.eye(d, device=device))

    @staticmethod
    def activation_side(x: Tensor, *operands: Tensor) -> Tensor:
        (matrix,) = operands
        x = wide(x)
        return x @ matrix.to(x.dtype)

    def weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return weight.to(dtype) @ inverse(self.matrix).T.to(dtype)

    def inverse_weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return weight.to(dtype) @ self.matrix.T.to(dtype)


TRANSFORMS: dict[str, type[Transform]] = {
    c.kind: c for c in (ChannelShift, ChannelScale, Hadamard, Kronecker, Dense, BlockRotations)
}


def transform_class(config: Any) -> type[Transform]:
    """The class of a transform's config; AttarError for an unknown kind."""
    kind = config.get("kind") if isinstance(config, dict) else config
    if not isinstance(kind, str) or kind not in TRANSFORMS:
        raise AttarError(f"unknown transform {kind!r}", fix="Update attar, or compress the model again")
    return TRANSFORMS[kind]


def transform_from_config(config: dict[str, Any], d: int, device: Any = "meta") -> Transform:
    """An empty transform of width d as described by `config`; AttarError for an unknown kind or field."""
    return transform_class(config).from_config(config, d, device)


def is_shifted(configs: Iterable[dict[str, Any]]) -> bool:
    """Whether a channel shift is among the transforms of a layer, whose bias then has what the shift takes away."""
    return any(config["kind"] == ChannelShift.kind for config in configs)


def transform_weight(
    transforms: Iterable[Transform], weight: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Weight side of all `transforms` in their order: W (out, d) -> W̃ (out, d)."""
    weight = weight.to(dtype)
    for transform in transforms:
        weight = transform.weight_side(weight, dtype)
    return weight


def restore_weight(
    transforms: Iterable[Transform], weight: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Undoes `transform_weight`: W̃ (out, d) -> W (out, d)."""
    weight = weight.to(dtype)
    for transform in reversed(list(transforms)):
        weight = transform.inverse_weight_side(weight, dtype)
    return weight


def _check_signs(signs: Tensor) -> None:
    if not signs.is_meta and not bool((signs.abs() == 1).all()):
        raise AttarError("the signs of a Hadamard rotation must be +1 or -1", where="Hadamard")


def _rotate(x: Tensor, base: Tensor, block: int) -> Tensor:
    """x (..., d) -> x Hᵀ/√block: (..., blocks, K, 2^m), Walsh-Hadamard, then the base (K, K)."""
    order = base.shape[0]
    y = walsh_hadamard(x.reshape(-1, order, block // order))
    if order > 1:
        y = base.to(x.dtype) @ y
    return (y * block**-0.5).reshape(x.shape)


def _apply_kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    y = x.reshape(-1, left.shape[0], right.shape[0]) @ right  # (n, l, r)
    return (left.T @ y).reshape(x.shape)


def as_module_list(transforms: Iterable[Transform] | nn.ModuleList) -> nn.ModuleList:
    """The transforms as a ModuleList, checked to be runtime transforms."""
    found = list(transforms)
    for transform in found:
        if not isinstance(transform, Transform):
            raise AttarError(f"{type(transform).__name__} is not a run-time transform")
    return nn.ModuleList(found)
