"""Rounding of weights to codes at frozen scales: nearest, and GPTQ (arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from attar import ranks
from attar.errors import AttarError
from attar.quantize.linear import QuantizedLinear
from attar.quantize.watch import watching
from attar.runtime.formats import decode, encode, wide
from attar.runtime.reference import quantize


class HessianAccumulator:
    """Running mean H = (2/N) Σ xᵀx over the N tokens seen so far; (d, d), float32 or the dtype given."""

    def __init__(
        self, d: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.hessian = torch.zeros(d, d, device=device, dtype=dtype)
        self.tokens = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """x: (..., d), the layer's transformed inputs; every leading axis counts as tokens."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self.hessian.dtype)
        total = self.tokens + x.shape[0]
        if total:
            self.hessian.addmm_(x.T, x, beta=self.tokens / total, alpha=2 / total)
        self.tokens = total

    def merge(self) -> None:
        """The mean over the tokens that all processes have seen."""
        (total,) = ranks.sums(self.tokens)
        if total > self.tokens:
            self.hessian.mul_(self.tokens / total)
        ranks.sum_(self.hessian)
        self.tokens = int(total)


def collect_hessians(
    run: Callable[[Any], Any], calls: Iterable[Any], layers: Mapping[str, QuantizedLinear]
) -> dict[str, Tensor]:
    """GPTQ's Hessian of every layer's transformed input, in one pass over the calls of all processes.

    run: runs the block, with its QuantizedLinears in place, on one call. Returns name → (d_in, d_in) float32.
    Raises AttarError for a layer that no call reached.
    """
    found = {n: HessianAccumulator(layer.in_features, layer.weight.device) for n, layer in layers.items()}
    with watching(layers, lambda name, layer, x: found[name].update(layer.transform_input(x))):
        for call in calls:
            run(call)
    for accumulator in found.values():
        accumulator.merge()
    missing = [name for name, accumulator in found.items() if accumulator.tokens == 0]
    if missing:
        raise AttarError(f"{len(missing)} layers were not reached by any calibration call", where=missing[0])
    return {name: accumulator.hessian for name, accumulator in found.items()}


def nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes (out, in) of the weight (out, in), rounded to nearest. scale: (out, groups)."""
    return quantize(weight, column_scales(scale, weight), bits)


def gptq_codes(
    layer: QuantizedLinear,
    hessian: Tensor,
    damping: float,
    block: int,
    whole: bool = False,
    by_activation: bool = False,
) -> Tensor:
    """GPTQ's codes (out, in) of a layer at the scales of its clipping. A row's codes depend on no other row's.

    whole: approximate the weight as it is, so that later columns make up for what the clipping cuts off too; by default
    the clipped weight, as FlatQuant's code does. by_activation: columns in the order of their inputs' mean squares, the
    largest first, while there are most others to make up for them (GPTQ's "act-order"). What is stored is the same.
    """
    weight, scale = layer.baked_weight(clipped=not whole)
    _check_hessian(weight, hessian)
    order = torch.arange(len(hessian), device=hessian.device)
    if by_activation:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order] if by_activation else hessian, damping)

    def codes(rows: Tensor, scales: Tensor, bits: int, number: str, levels: Tensor | None) -> Tensor:
        return _gptq(rows, factor, scales, bits, block, number, levels, order)

    return layer.quantizer.by_kinds(codes, weight, scale)


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    bits: int,
    damping: float = 0.01,
    block: int = 128,
    number: str = "int",
    levels: Tensor | None = None,
) -> Tensor:
    """Codes that compensate each column's rounding error in the columns still to come (GPTQ).

    weight: (out, in), transformed (and clipped). hessian: (in, in), of the transformed inputs. scale:
    (out, groups), frozen: recomputing scales here would undo what the clipping learned. damping: share of
    the mean diagonal added to it. block: columns whose updates are applied at once to the rest. number, levels: the
    format (attar.runtime.formats) and, of a table, its numbers (1 or out, 1 or groups, 2^bits).
    Inputs that were never active (a zero on the diagonal) are rounded to nearest.
    Returns codes (out, in), int8 (int16 above 8 bits). Raises AttarError when the Hessian is not finite or
    stays indefinite in float64 at 1000 times the damping.
    """
    _check_hessian(weight, hessian)
    column_scales(scale, weight)
    order = torch.arange(weight.shape[1], device=weight.device)
    return _gptq(weight, inverse_factor(hessian, damping), scale, bits, block, number, levels, order)


@torch.no_grad()
def _gptq(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    bits: int,
    block: int,
    number: str,
    levels: Tensor | None,
    order: Tensor,
) -> Tensor:
    """`gptq` of the columns in an order (in,), with the factor (in, in) of their Hessian in that order."""
    columns = weight.shape[1]
    scale, factor = scale.to(wide(weight).dtype), factor.to(wide(weight).dtype)
    group = (order // (columns // scale.shape[1])).tolist()  # of each column
    weight = wide(weight)[:, order]  # a copy, in which later columns take up what earlier ones lose
    codes = torch.empty_like(weight, dtype=torch.int8 if bits <= 8 else torch.int16)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty_like(weight[:, start:end])
        for i in range(start, end):
            column, step = weight[:, i], scale[:, group[i]]
            own = None if levels is None else levels[:, group[i] % levels.shape[1]]  # (1 or out, 2^bits)
            code = encode((column / step)[:, None], number, bits, own)
            codes[:, i : i + 1] = code
            rounded = decode(code, number, bits, own)[:, 0].to(weight.dtype) * step
            error = (column - rounded) / factor[i, i]
            weight[:, i:end].addr_(error, factor[i, i:end], alpha=-1)
            errors[:, i - start] = error
        weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return torch.empty_like(codes).index_copy_(1, order, codes)


def _check_hessian(weight: Tensor, hessian: Tensor) -> None:
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise AttarError(f"a Hessian of {tuple(hessian.shape)} does not fit {weight.shape[1]} input channels")


def column_scales(scale: Tensor, weight: Tensor) -> Tensor:
    """(out, groups) -> (out, in), or (out, 1) -> (out, in) without copying."""
    if scale.ndim != 2 or scale.shape[0] != weight.shape[0] or weight.shape[1] % scale.shape[1]:
        raise AttarError(f"scales of {tuple(scale.shape)} do not fit a weight of {tuple(weight.shape)}")
    size = weight.shape[1] // scale.shape[1]
    return scale.unsqueeze(-1).expand(-1, -1, size).reshape(weight.shape)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of (H + λI)^{-1}, λ = damping · mean diag H; on failure float64, then more λ."""
    if not torch.isfinite(hessian).all():
        raise AttarError("the Hessian of a layer is not finite", fix="Check the calibration inputs for NaN")
    hessian = wide(hessian)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    hessian = hessian + torch.diag(dead.to(hessian.dtype))
    mean = diagonal.mean()
    eye = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    attempts = [(hessian.dtype, damping), (torch.float64, damping)]
    attempts += [(torch.float64, damping * 10**k) for k in (1, 2, 3)]
    for dtype, share in attempts:
        damped = (hessian + share * mean * eye).to(dtype)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info.item():
            continue
        # The upper factor of H^{-1} is unique, so any route to it will do; this one needs H's factor only.
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not info.item() and torch.isfinite(upper).all():
            return upper
    raise AttarError(
        f"the Hessian of a layer stays indefinite at damping {attempts[-1][1]:g}",
        fix="Use more calibration samples, or nearest rounding for this layer",
    )
