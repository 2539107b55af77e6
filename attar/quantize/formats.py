"""Symmetric fake quantization with straight-through gradients, for weights and activations.

`number` is a format of `attar.runtime.formats`: int, fp8, full_range, or a table with its `levels`.
Values are those of `attar.runtime.reference`, bit for bit: fake ≡ dequantize ∘ quantize. Gradients (S²Q-VDiT's base, as
in FlatQuant): identity through round, identity inside and zero outside the clipping range, and the step size Δ stays a
differentiable function of the clipping factors and the tensor's extremes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attar.errors import AttarError
from attar.quantize.compiled import FakeQuantizeRows, compiled_for
from attar.runtime.formats import INTEGER_FORMATS, decode, encode, integer_range, wide
from attar.runtime.reference import MIN_ABSMAX, row_step


def fake_quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x̂ = Δ · clamp(round(x / Δ)) for a given step size; differentiable in x and in Δ.

    scale Δ broadcasts against x. Outside the range of codes x gets no gradient, and Δ
    gets that of the saturated code.
    """
    low, high = integer_range(bits)
    steps = (wide(x) / scale).clamp(low, high)
    return (steps + (steps.round() - steps).detach()) * scale


def fake_quantize_tokens(x: Tensor, bits: int, clip: Tensor | None = None, number: str = "int") -> Tensor:
    """Dynamic fake quantization of activations, one Δ for each token.

    x: (..., d). clip: learned factors (f_lo, f_hi) of the layer, shape (2,), or None for the full range.
    """
    return _fake_quantize_range(wide(x), clip, bits, number)


def fake_quantize_weight(
    weight: Tensor,
    bits: int,
    clip: Tensor | None = None,
    group_size: int | None = None,
    number: str = "int",
    levels: Tensor | None = None,
) -> Tensor:
    """Fake quantization of a weight, one Δ for each output channel or each group of input channels.

    weight: (out, in). clip: learned factors (f_lo, f_hi), shape (2, out, groups), groups = 1 per output
    channel, or None. levels: (1 or out, 1 or groups, 2^bits) of a table. Returns (out, in).
    """
    grouped = _grouped(wide(weight), group_size)
    return _fake_quantize_range(grouped, clip, bits, number, levels).view(weight.shape)


def quantize_weight(
    weight: Tensor,
    bits: int,
    clip: Tensor | None = None,
    group_size: int | None = None,
    number: str = "int",
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out, groups) that `fake_quantize_weight` stands for."""
    grouped = _grouped(wide(weight), group_size)
    clamped, low, high = _clamp(grouped, clip)
    scale = row_step(low, high, bits, number)
    return encode(clamped / scale, number, bits, levels).view(weight.shape), scale.squeeze(-1)


def clip_weight(weight: Tensor, clip: Tensor | None, group_size: int | None = None) -> Tensor:
    """The weight (out, in) after clamping to its learned range, before rounding."""
    return _clamp(_grouped(wide(weight), group_size), clip)[0].view(weight.shape)


def weight_steps(weight: Tensor, clip: Tensor | None, group_size: int | None = None) -> Tensor:
    """The clamped weight divided by the largest magnitude of its row or group: (out, groups, in/groups) in [-1, 1]."""
    clamped, low, high = _clamp(_grouped(wide(weight), group_size), clip)
    return clamped / torch.maximum(low.abs(), high).clamp(min=MIN_ABSMAX)


def weight_magnitudes(weight: Tensor, clip: Tensor | None, group_size: int | None) -> Tensor:
    """What `weight_steps` divides by, (out, groups, 1): the largest magnitudes of the clamped weight."""
    _, low, high = _clamp(_grouped(wide(weight), group_size), clip)
    return torch.maximum(low.abs(), high).clamp(min=MIN_ABSMAX)


def group_count(in_features: int, group_size: int | None) -> int:
    """How many scales each row has. Raises AttarError when the groups do not divide the row."""
    if group_size is None:
        return 1
    if group_size < 1 or in_features % group_size:
        raise AttarError(
            f"groups of {group_size} do not divide {in_features} input channels",
            fix="Choose a divisor, or none",
        )
    return in_features // group_size


def _grouped(weight: Tensor, group_size: int | None) -> Tensor:
    groups = group_count(weight.shape[1], group_size)
    return weight.reshape(weight.shape[0], groups, -1)  # (out, in) -> (out, groups, in/groups)


def _clamp(grouped: Tensor, clip: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(clamped to the learned range, both ends of that range (out, groups, 1))."""
    smallest, largest = grouped.aminmax(dim=-1, keepdim=True)
    if clip is not None:
        smallest, largest = smallest * clip[0].unsqueeze(-1), largest * clip[1].unsqueeze(-1)
    return grouped.clamp(smallest, largest), smallest, largest


def _fake_quantize_range(
    x: Tensor, clip: Tensor | None, bits: int, number: str = "int", levels: Tensor | None = None
) -> Tensor:
    """x (..., d). clip: (f_lo, f_hi) of all rows (2,), or of each row (2, ...); None for the full range."""
    if number not in INTEGER_FORMATS:
        clamped, low, high = _clamp(x, clip)
        scale = row_step(low, high, bits, number)
        return _RoundToNumber.apply(clamped / scale, number, bits, levels) * scale
    integer_range(bits)
    factors = x.new_ones(2) if clip is None else clip
    if factors.shape in ((2,), (2, *x.shape[:-1])) and compiled_for(x, factors):
        return FakeQuantizeRows.apply(x, factors, bits, number)
    low, high = factors.unbind(0) if factors.ndim == 1 else factors.unsqueeze(-1).unbind(0)
    return _FakeQuantizeRange.apply(x, low, high, bits, number)


class _RoundToNumber(torch.autograd.Function):
    """The numbers of a format that lie nearest; the gradient passes to steps as if nothing was rounded.

    The gradient of a level is the sum over all that were rounded to it.
    """

    @staticmethod
    def forward(ctx: Any, steps: Tensor, number: str, bits: int, levels: Tensor | None) -> Tensor:
        codes = encode(steps, number, bits, levels)
        ctx.bits, ctx.shape = bits, None if levels is None else levels.shape
        if ctx.needs_input_grad[3]:
            ctx.save_for_backward(codes)
        return decode(codes, number, bits, levels).to(steps.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:  # type: ignore[override]
        if not ctx.needs_input_grad[3]:
            return grad, None, None, None
        places = ctx.saved_tensors[0].long() + (1 << (ctx.bits - 1))
        sums = grad.new_zeros(*grad.shape[:-1], 1 << ctx.bits).scatter_add_(-1, places, grad)
        return grad, None, None, sums.sum_to_size(ctx.shape)


class _FakeQuantizeRange(torch.autograd.Function):
    """Clamp to [f_lo · min, f_hi · max] along the last axis, then round in steps of Δ (`row_step`).

    One function with its own backward, because a training step applies it to every weight and activation of
    a block. Masks are float signs: on CPU, comparisons and `aminmax` along an axis are not vectorised.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low_factor: Tensor, high_factor: Tensor, bits: int, number: str
    ) -> Tensor:
        smallest, largest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        low, high = smallest * low_factor, largest * high_factor
        scale = row_step(low, high, bits, number)
        clamped = torch.maximum(x, low)
        torch.minimum(clamped, high, out=clamped)
        needs_grad = any(ctx.needs_input_grad[:3])
        side = (x - clamped).sign_() if needs_grad else None  # 1 above the range, −1 below, 0 inside
        steps = clamped.div_(scale)
        codes = steps.round()
        if needs_grad:
            residual = steps.neg_().add_(codes)  # ∂x̂/∂Δ
            ctx.save_for_backward(x, side, residual, low, high, smallest, largest, low_factor, high_factor)
            ctx.bits, ctx.number = bits, number
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, side, residual, low, high, smallest, largest, low_factor, high_factor = ctx.saved_tensors
        signed = grad * side
        difference = signed.sum(-1, keepdim=True)
        clipped = signed.mul_(side)  # the gradient outside the range
        total = clipped.sum(-1, keepdim=True)
        grad_step = (grad * residual).sum(-1, keepdim=True)
        low_share, high_share = _step_shares(grad_step, low, high, ctx.bits, ctx.number)
        grad_high = (total + difference).mul_(0.5).add_(high_share)
        grad_low = (total - difference).mul_(0.5).add_(low_share)
        grad_x = grad_low_factor = grad_high_factor = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.sub(grad, clipped, out=clipped)
            grad_x.scatter_add_(-1, x.argmax(-1, keepdim=True), grad_high * high_factor)
            grad_x.scatter_add_(-1, x.argmin(-1, keepdim=True), grad_low * low_factor)
        if ctx.needs_input_grad[1]:
            grad_low_factor = (grad_low * smallest).sum_to_size(low_factor.shape)
        if ctx.needs_input_grad[2]:
            grad_high_factor = (grad_high * largest).sum_to_size(high_factor.shape)
        return grad_x, grad_low_factor, grad_high_factor, None, None


def _step_shares(
    grad_step: Tensor, low: Tensor, high: Tensor, bits: int, number: str
) -> tuple[Tensor, Tensor]:
    """Gradients of both ends by that of Δ: one of them decides it, unless both are below the smallest range."""
    most = integer_range(bits)[1]
    if number != "full_range":
        magnitude = low.abs()
        share = grad_step / most
        of_high = torch.where(high >= magnitude.clamp(min=MIN_ABSMAX), share, 0)
        of_low = torch.where(magnitude > high.clamp(min=MIN_ABSMAX), share * low.sign(), 0)
        return of_low, of_high
    upper = high > -low  # whose step is negative
    per_high, per_low = (1 / (most + upper.to(high)), 1 / (most + 1 - upper.to(high)))
    by_high, by_low = high * per_high, -low * per_low
    alive = torch.maximum(by_high, by_low) > MIN_ABSMAX / (most + 1)
    signed = torch.where(upper, -grad_step, grad_step)
    of_high = torch.where(alive & (by_high >= by_low), signed * per_high, 0)
    of_low = torch.where(alive & (by_low > by_high), -signed * per_low, 0)
    return of_low, of_high
