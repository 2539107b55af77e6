"""Symmetric quantization in plain PyTorch: the exact definition that every faster backend must match.

    delta = max|x| / (2^(N-1) - 1),   q = clamp(round(x / delta), -2^(N-1), 2^(N-1) - 1),   x_hat = delta * q

for integers. The format "full_range" uses -2^(N-1) too, for whichever end of a row is farther from zero: delta is
negative where that is the upper one, and |delta| = max(far / 2^(N-1), near / (2^(N-1) - 1)), as in ggml's Q4_0 for
weights. Other number formats (formats.py) have another largest number and other numbers to round to. Rounding is half
to even. Scales and codes are computed in float32 whatever the dtype of the model (float64 tensors stay float64),
because a bfloat16 scale alone costs more than an 8-bit rounding step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.runtime.branch import Branch
from attar.runtime.formats import encode, largest, wide

MIN_ABSMAX = 1e-5  # an all-zero row or token gets this range instead of a division by zero
_EXACT_FLOAT32 = 2**24  # integers up to here, and their sums, are exact in float32


def symmetric_scale(absmax: Tensor, bits: int, number: str = "int") -> Tensor:
    """Step size Δ of the symmetric quantizer for the range [-absmax, absmax]: float32, shaped like `absmax`.

    number: the format of the codes. `absmax` is raised to 1e-5, so that rows of zeros keep a finite positive scale.
    NaN passes through.
    """
    absmax = wide(absmax).clamp(min=MIN_ABSMAX)
    # A tensor, since CUDA multiplies by the reciprocal of a number: another step size than the CPU's, by a rounding.
    return absmax / torch.full_like(absmax, largest(number, bits))


def row_step(low: Tensor, high: Tensor, bits: int, number: str = "int") -> Tensor:
    """Step size Δ, float32, of rows whose numbers lie in [low, high], shaped like these. number: the format."""
    low, high = wide(low), wide(high)
    if number != "full_range":
        return symmetric_scale(torch.maximum(low.abs(), high), bits, number)
    below, codes = -low, 1 << (bits - 1)
    far = torch.maximum(below, high) / codes
    near = torch.minimum(below, high)
    step = torch.maximum(far, near / torch.full_like(near, codes - 1)).clamp(min=MIN_ABSMAX / codes)
    return torch.where(high > below, -step, step)


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of `x` for a scale that broadcasts against it: int8, or int16 above 8 bits."""
    return encode(wide(x) / scale, "int", bits)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """codes · scale in float32 (float64 if the scale is)."""
    return codes.to(wide(scale).dtype) * wide(scale)


def quantize_tokens(
    x: Tensor, bits: int, clip: Tensor | tuple[float, float] | None = None, number: str = "int"
) -> tuple[Tensor, Tensor]:
    """Dynamic per-token quantization of activations x (..., d) -> codes (..., d), scale (..., 1).

    `clip` = (f_lo, f_hi) are the learned clipping factors of a layer: a token is clamped to
    [f_lo · min, f_hi · max], which Δ is of (`row_step`). number: the format, int, full_range or fp8.
    A token with NaN or infinity gets a non-finite scale, hence a NaN result; other tokens are untouched.
    """
    x = wide(x)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if clip is not None:
        low, high = low * clip[0], high * clip[1]
        x = torch.minimum(torch.maximum(x, low), high)
    scale = row_step(low, high, bits, number)
    return encode(x / scale, number, bits), scale


def integer_matmul(codes_x: Tensor, codes_w: Tensor, bits_x: int = 8, bits_w: int = 8) -> Tensor:
    """Exact accumulation codes_x (..., in) · codes_w (out, in)ᵀ -> (..., out), integers held in floats.

    Floating-point units do integer arithmetic without error while every partial sum stays below 2^24
    (float32) or 2^53 (float64), and BLAS is much faster than torch's integer matmul.
    """
    bound = codes_w.shape[-1] << (bits_x - 1 + bits_w - 1)
    dtype = torch.float32 if bound <= _EXACT_FLOAT32 else torch.float64
    return F.linear(codes_x.to(dtype), codes_w.to(dtype))


def integer_linear(
    codes_x: Tensor,
    scale_x: Tensor,
    codes_w: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    bits_x: int = 8,
    bits_w: int = 8,
    gelu: str | None = None,
    branch: Branch | None = None,
) -> Tensor:
    """y = (codes_x · codes_wᵀ) · scale_x · scale_wᵀ + bias + branch, or GELU of it.

    codes_x (..., in) with scale_x (..., 1); codes_w (out, in) with scale_w (out, 1); bias (out,) or None.
    The sum over `in` is exact; scaling is done in float32 (float64 when `out_dtype` is float64). `bits_x`
    and `bits_w` bound the codes and so decide whether float32 can accumulate them exactly. `gelu` is torch's name
    of an approximation, "none" or "tanh"; GELU is of y before it is rounded to `out_dtype`. `branch`: low (..., rank)
    and up (out, rank), of any type, of which low · upᵀ is added.
    """
    wide_dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    y = integer_matmul(codes_x, codes_w, bits_x, bits_w).to(wide_dtype)
    return _finished(y, scale_x, scale_w, bias, out_dtype, gelu, branch)


def floating_linear(
    numbers_x: Tensor,
    scale_x: Tensor,
    numbers_w: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    gelu: str | None = None,
    branch: Branch | None = None,
) -> Tensor:
    """As `integer_linear`, for the numbers of other formats: products and sums are rounded to float32 (or float64).

    numbers_x (..., in), numbers_w (out, in): decoded, not yet scaled. Scales, bias, gelu and branch as there.
    """
    wide_dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    y = F.linear(numbers_x.to(wide_dtype), numbers_w.to(wide_dtype))
    return _finished(y, scale_x, scale_w, bias, out_dtype, gelu, branch)


def _finished(
    y: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    gelu: str | None,
    branch: Branch | None,
) -> Tensor:
    """Sums y (..., out) become outputs: all in y's type, and rounded once."""
    y = y * scale_x.to(y.dtype) * scale_w.to(y.dtype).reshape(-1)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if branch is not None:
        low, up = branch
        y = y + F.linear(low.to(y.dtype), up.to(y.dtype))
    return (y if gelu is None else F.gelu(y, approximate=gelu)).to(out_dtype)
