"""`torch.ops.attar.packed_linear`: all of a packed layer's forward as one operator.

One operator, so that torch.compile sees no graph break, and so that a kernel may fuse what lies between the input
and the output. The default implementation is the reference; a faster one is registered for its dispatch key.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.errors import AttarError
from attar.runtime.backend import BACKENDS, DTYPES, MAX_IN_FEATURES, backend_name, forced_backend
from attar.runtime.branch import Branch, finished
from attar.runtime.formats import INTEGER_FORMATS, decode
from attar.runtime.packing import packed_width, unpack
from attar.runtime.reference import floating_linear, integer_linear, quantize_tokens
from attar.runtime.transforms import TRANSFORMS

_NAME = "attar::packed_linear"

torch.library.define(
    _NAME,
    "(Tensor x, Tensor codes, Tensor weight_scale, Tensor? bias, Tensor? act_clip, int weight_bits, "
    "int? act_bits, str[] transforms, Tensor[] operands, str? gelu=None, str weight_format='int', "
    "str act_format='int', Tensor? levels=None, Tensor? low=None, Tensor? up=None) -> Tensor",
)


def packed_linear(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_clip: Tensor | None,
    weight_bits: int,
    act_bits: int | None,
    transforms: list[str],
    operands: list[Tensor],
    gelu: str | None = None,
    weight_format: str = "int",
    act_format: str = "int",
    levels: Tensor | None = None,
    branch: Branch | None = None,
) -> Tensor:
    """x (..., in) -> (..., out) in x.dtype, as `PackedLinear` says; runs the operator.

    codes uint8 (out, packed width); weight_scale float32 (out, 1), or (out, groups) with `act_bits` None; bias
    (out,); act_clip float32 (2,). `transforms` are kinds, and `operands` their tensors one after another
    (`Transform.operands`). `gelu`, "none" or "tanh" as torch names its approximations, asks for GELU of the output:
    of the float32 sums before they are rounded to x.dtype, or of the product in x.dtype with `act_bits` None and for
    many rows of float8 on Hopper.
    weight_format, act_format: of the codes (formats.py); levels: float16 (1 or out, 1 or groups, 2^bits), of the format
    "table". branch: low (..., rank) and up (out, rank), both in x.dtype, of a low-rank branch, whose product is added
    before GELU and before the sums are rounded, where GELU is of these. No gradient: `PackedLinear` has a
    straight-through one.
    Raises AttarError when the tensors lie on several devices, as after a part of a layer was moved, and for another
    `gelu`.
    """
    if gelu not in (None, "none", "tanh"):
        raise AttarError(f"unknown GELU {gelu!r}", fix='Choose "none" or "tanh"')
    low, up = branch or (None, None)
    device = x.device
    for tensor in (codes, weight_scale, bias, act_clip, levels, low, up, *operands):
        if tensor is not None and tensor.device != device:
            raise AttarError("the tensors of a packed layer and its input are not on one device")
    return torch.ops.attar.packed_linear(
        x, codes, weight_scale, bias, act_clip, weight_bits, act_bits, transforms, operands,
        gelu, weight_format, act_format, levels, low, up,
    )  # fmt: skip


def dequantized(
    codes: Tensor,
    weight_scale: Tensor,
    bits: int,
    in_features: int,
    weight_format: str = "int",
    levels: Tensor | None = None,
) -> Tensor:
    """Packed codes (out, width) and scales (out, groups) -> their numbers times the scales, float32 (out, in)."""
    numbers = _numbers(codes, weight_scale.shape[1], bits, in_features, weight_format, levels)
    return (numbers * weight_scale[..., None]).flatten(1)


def _numbers(
    codes: Tensor, groups: int, bits: int, in_features: int, weight_format: str, levels: Tensor | None
) -> Tensor:
    """What packed codes (out, width) stand for before their scales, float32 (out, groups, in/groups)."""
    return decode(unpack(codes, bits, in_features).unflatten(1, (groups, -1)), weight_format, bits, levels)


def _fake(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _reference(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_clip: Tensor | None,
    weight_bits: int,
    act_bits: int | None,
    transforms: list[str],
    operands: list[Tensor],
    gelu: str | None = None,
    weight_format: str = "int",
    act_format: str = "int",
    levels: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    backend_name(x.device)  # a backend that is forced, and cannot run here, is an error
    branch = None if low is None or up is None else (low, up)
    y = x
    for kind, own in _steps(transforms, operands):
        y = TRANSFORMS[kind].activation_side(y, *own)
    if act_bits is None:
        weight = dequantized(codes, weight_scale, weight_bits, x.shape[-1], weight_format, levels).to(x.dtype)
        y = F.linear(y.to(x.dtype), weight, None if bias is None else bias.to(x.dtype))
        return finished(y, branch, gelu)
    quantized = quantize_tokens(y, act_bits, act_clip, act_format)
    if weight_format != "int" or act_format not in INTEGER_FORMATS:
        numbers = decode(quantized[0], act_format, act_bits)
        weight = _numbers(codes, 1, weight_bits, x.shape[-1], weight_format, levels)
        return floating_linear(
            numbers, quantized[1], weight.flatten(1), weight_scale, bias, x.dtype, gelu, branch
        )
    weight = unpack(codes, weight_bits, x.shape[-1]), weight_scale
    return integer_linear(*quantized, *weight, bias, x.dtype, act_bits, weight_bits, gelu, branch)


def _fast(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_clip: Tensor | None,
    weight_bits: int,
    act_bits: int | None,
    transforms: list[str],
    operands: list[Tensor],
    gelu: str | None = None,
    weight_format: str = "int",
    act_format: str = "int",
    levels: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    name = backend_name(x.device)
    formats = (weight_format, None if act_bits is None else act_format)
    supported = x.dtype in DTYPES and 0 < x.shape[-1] <= MAX_IN_FEATURES
    if name == "reference" or not supported or formats not in BACKENDS[name].formats():
        if forced_backend() == name != "reference":
            numbers = f"{weight_format} weights with {formats[1] or 'floating-point'} activations"
            shape = f"{x.dtype} input of width {x.shape[-1]}"
            raise AttarError(
                f"the {name} kernels take no {numbers if supported else shape}",
                fix="Use float32, bfloat16 or float16, and integers, or the backend 'reference'",
            )
        return _reference(
            x, codes, weight_scale, bias, act_clip, weight_bits, act_bits, transforms, operands,
            gelu, weight_format, act_format, levels, low, up,
        )  # fmt: skip
    branch = None if low is None or up is None else (low, up)
    _check(x.shape[-1], codes, weight_scale, bias, weight_bits)
    if branch is not None:
        _check_branch(x, codes, *branch)
    kernels = BACKENDS[name].load()
    steps, y = _steps(transforms, operands), x
    while steps:  # what torch transforms may come out in float32, of which a kernel may take less
        fused = 0 if act_bits is None else kernels.fusable(steps, y)
        if fused == len(steps):
            break
        for kind, own in steps[: len(steps) - fused]:
            y = TRANSFORMS[kind].activation_side(y, *own)
        steps = steps[len(steps) - fused :]
    if act_bits is None:
        y = kernels.weight_only(y.to(x.dtype), codes, weight_scale, bias, weight_bits, weight_format)
        return finished(y, branch, gelu)
    return kernels.linear(
        y, codes, weight_scale, bias, act_clip, weight_bits, act_bits, steps, x.dtype, gelu, act_format, branch,
    )  # fmt: skip


torch.library.register_fake(_NAME, _fake)
torch.library.impl(_NAME, "default", _reference)
for _device in ("cpu", "cuda"):
    torch.library.impl(_NAME, _device, _fast)


def _check(width: int, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, weight_bits: int) -> None:
    """Guards the memory that the kernels read: they are given addresses."""
    outputs = codes.shape[0]
    fits = codes.dtype == torch.uint8 and codes.shape[1] == packed_width(width, weight_bits)
    fits &= weight_scale.shape[0] == outputs and width % weight_scale.shape[1] == 0
    if not fits or (bias is not None and bias.shape != (outputs,)):
        raise AttarError(
            f"an input of width {width} does not fit {weight_bits}-bit codes {tuple(codes.shape)} "
            f"with scales {tuple(weight_scale.shape)}"
        )


def _check_branch(x: Tensor, codes: Tensor, low: Tensor, up: Tensor) -> None:
    if low.shape != (*x.shape[:-1], up.shape[-1]) or up.shape[0] != codes.shape[0]:
        raise AttarError(
            f"a branch of {tuple(low.shape)} and {tuple(up.shape)} does not fit inputs of {tuple(x.shape)} with "
            f"{codes.shape[0]} outputs"
        )


def _steps(transforms: list[str], operands: list[Tensor]) -> list[tuple[str, list[Tensor]]]:
    """The flat operands, divided among the transforms that they belong to."""
    steps, first = [], 0
    for kind in transforms:
        end = first + len(TRANSFORMS[kind].names)
        steps.append((kind, operands[first:end]))
        first = end
    return steps
