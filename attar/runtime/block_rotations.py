"""Rotations of small blocks of channels, with permutations of the channels between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attar.errors import AttarError
from attar.runtime.reference import wide
from attar.runtime.transform import Transform, check_invertible, float32, inverse, only

LARGEST_BLOCK = 128


def block_width(d: int) -> int:
    """The largest divisor of d up to 128."""
    return next(size for size in range(min(d, LARGEST_BLOCK), 0, -1) if d % size == 0)


class BlockRotations(Transform):
    """T = R1 Π1 R2 …: block-diagonal matrices, channels permuted between them (DuQuant, arXiv 2406.01721).

    rotations: (stages, d / block, block, block), a block's matrix for each stage. orders: (stages - 1, d); after a
    permutation, channel i is the one that was channel orders[k, i] before. n·d·block·stages multiplications.
    """

    kind = "block_rotations"
    names = ("rotations", "orders")
    rotations: Tensor
    orders: Tensor

    def __init__(self, rotations: Tensor, orders: Tensor) -> None:
        super().__init__()
        check_invertible(rotations, "BlockRotations.rotations", ndim=4)
        stages, blocks, block, _ = rotations.shape
        if not stages or orders.shape != (stages - 1, blocks * block):
            raise AttarError(
                f"{stages} rotations of {blocks} blocks of {block} do not go with orders of {tuple(orders.shape)}",
                where="BlockRotations",
            )
        _check_orders(orders)
        self.register_buffer("rotations", float32(rotations))
        self.register_buffer("orders", orders.detach().to(torch.int32, copy=True).contiguous())

    def check(self) -> None:
        super().check()
        _check_orders(self.orders)

    @classmethod
    def from_config(cls, config: dict[str, Any], d: int, device: Any = "meta") -> BlockRotations:
        only(config, "kind", "block", "stages")
        block, stages = config.get("block", 0), config.get("stages", 0)
        if block < 1 or stages < 1 or d % block:
            raise AttarError(f"{stages} rotations of blocks of {block} do not fit a layer of width {d}")
        rotations = torch.eye(block, device=device).repeat(stages, d // block, 1, 1)
        return cls(rotations, torch.arange(d, device=device).repeat(stages - 1, 1))

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "block": self.rotations.shape[-1], "stages": self.rotations.shape[0]}

    @staticmethod
    def activation_side(x: Tensor, *operands: Tensor) -> Tensor:
        rotations, orders = operands
        x = wide(x)
        for stage, matrices in enumerate(rotations.to(x.dtype).unbind(0)):
            if stage:
                x = x.index_select(-1, orders[stage - 1])
            x = _blockwise(x, matrices)
        return x

    def weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.activation_side(weight.to(dtype), inverse(self.rotations).mT, self.orders)

    def inverse_weight_side(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        weight, matrices = weight.to(dtype), self.rotations.to(dtype).mT
        for stage in reversed(range(len(matrices))):
            weight = _blockwise(weight, matrices[stage])
            if stage:
                weight = weight.index_select(-1, self.orders[stage - 1].argsort())
        return weight


def _check_orders(orders: Tensor) -> None:
    if orders.is_meta:
        return
    every = torch.arange(orders.shape[1], device=orders.device).expand(orders.shape)
    if not torch.equal(orders.long().sort(-1).values, every):
        raise AttarError("an order of channels must name each once", where="BlockRotations")


def _blockwise(x: Tensor, matrices: Tensor) -> Tensor:
    """x (..., blocks · size) times a matrix (blocks, size, size) for each block."""
    blocks, size, _ = matrices.shape
    y = x.reshape(-1, blocks, size).transpose(0, 1) @ matrices  # (blocks, n, size)
    return y.transpose(0, 1).reshape(x.shape)
