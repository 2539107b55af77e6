"""The deployed form of a quantized linear layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.errors import AttarError
from attar.runtime.autocast import full_precision
from attar.runtime.branch import branch_low, branch_product
from attar.runtime.computed_weight import computed_weight
from attar.runtime.float32 import KeepsBufferDtype
from attar.runtime.formats import check_levels, decode
from attar.runtime.ops import packed_linear
from attar.runtime.packing import pack, packed_width, unpack
from attar.runtime.rows import RowKind, Rows, check_rows, pack_rows, sizes, split_rows
from attar.runtime.scheme import (
    FRAME_GATE,
    LATER,
    check_formats,
    check_mixed,
    check_scheme,
    later_fields,
    levels_of,
    table_shape,
)
from attar.runtime.step_groups import GroupedActs, check_act_groups, check_clip_groups
from attar.runtime.transforms import (
    ChannelShift,
    Transform,
    as_module_list,
    is_shifted,
    restore_weight,
    transform_from_config,
)

_INPUTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class PackedLinear(KeepsBufferDtype, GroupedActs, nn.Linear):
    """A linear layer that keeps its weight as packed codes.

    x (..., in) -> transforms -> per-token quantization -> integer matmul -> scales and bias -> (..., out),
    in x.dtype. With `act_bits` None activations stay floating point and the weight is dequantized to x.dtype. Where
    `weight_format` or `act_format` are not integers (formats.py) the product is one of floating-point numbers.
    With a low-rank branch, y = … + (x Aᵀ) Bᵀ, on the input as it comes and in its dtype; with a gate over frames times
    M_f, f the frame of the token (branch.py).

    Buffers: `codes` uint8 (out, ceil(in·bits/8)); `weight_scale` float32 (out, 1), or (out, in/group_size);
    `act_clip` float32 (2,) = (f_lo, f_hi), (groups, 2) or None; `transforms`, the activation side of the equivalent
    transforms, float32, and of a channel shift float16, with which there is a bias; `levels` float16 (1, 1, 2^bits),
    (out, 1, 2^bits) or (out, groups, 2^bits), the tables of the format "table", or None. `bias`, `low_rank_in`
    A (rank, in), `low_rank_out` B (out, rank) and `frame_gate` M (frames,) are Parameters in the dtype of the model, or
    None. There is no `weight` Parameter: the property gives the dequantized weight in the original basis, with the
    branch, in the dtype of the model.

    Rows of several kinds (rows.py): `rows` lists them, `weight_bits` is the widest's, `codes` and `levels` are flat,
    and the buffer `row_kind` uint8 (out,) says which row is which. Their products are computed kind by kind.

    `act_groups`: activation bits of each group of denoising steps, where these differ; `act_bits` are the widest then.
    `clip_groups`: how many groups of steps have clipping factors of their own, None where all share a pair. The model
    that the layer is part of says which group it is (step_groups.py).

    Gradients flow to the input (straight-through) and to a bias that wants one, so adapters beside or before the layer
    can be trained, and biases with them.
    """

    is_attar_packed = True
    codes: Tensor
    weight_scale: Tensor
    act_clip: Tensor | None
    levels: Tensor | None
    row_kind: Tensor | None
    low_rank_in: nn.Parameter | None
    low_rank_out: nn.Parameter | None
    frame_gate: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_bits: int = 4,
        act_bits: int | None = None,
        act_clip: bool = False,
        group_size: int | None = None,
        transforms: Iterable[Transform] = (),
        weight_format: str = "int",
        act_format: str = "int",
        levels: str | None = None,
        low_rank: int = 0,
        rows: Sequence[Any] | None = None,
        act_groups: Sequence[Any] | None = None,
        frame_gate: int | None = None,
        clip_groups: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer to load a checkpoint into; `from_codes` makes one with content."""
        nn.Module.__init__(self)
        check_scheme(weight_bits, act_bits, act_clip, group_size, in_features)
        check_formats(weight_format, weight_bits, act_format, act_bits, levels, low_rank, frame_gate)
        self.in_features, self.out_features = in_features, out_features
        self.weight_bits, self.act_bits, self.group_size = weight_bits, act_bits, group_size
        self.weight_format, self.act_format, self.low_rank = weight_format, act_format, low_rank
        self.act_groups = None if act_groups is None else check_act_groups(act_groups, act_bits, act_format)
        self.clip_groups = (
            None if clip_groups is None else check_clip_groups(clip_groups, act_clip, self.act_groups)
        )
        self.compute_dtype = dtype or torch.get_default_dtype()
        groups = 1 if group_size is None else in_features // group_size
        shape: tuple[int, ...] = (out_features, packed_width(in_features, weight_bits))
        tables = None if levels is None else (*table_shape(levels, out_features, groups), 1 << weight_bits)
        self.rows: list[RowKind] | None = None
        if rows is not None:
            self.rows = check_mixed(rows, out_features, weight_bits, weight_format, group_size)
            count, entries = sizes(self.rows, in_features)
            shape, tables = (count,), (entries,) if entries else None
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.uint8, device=device))
        kind = None if rows is None else torch.zeros(out_features, dtype=torch.uint8, device=device)
        self.register_buffer("row_kind", kind)
        self.register_buffer(
            "weight_scale", torch.ones(out_features, groups, dtype=torch.float32, device=device)
        )
        pairs = (2,) if self.clip_groups is None else (self.clip_groups, 2)
        clip = torch.ones(pairs, dtype=torch.float32, device=device) if act_clip else None
        self.register_buffer("act_clip", clip)
        table = None if tables is None else torch.zeros(tables, dtype=torch.float16, device=device)
        self.register_buffer("levels", table)
        self.transforms = as_module_list(transforms)
        shapes = {"bias": (out_features,)} if bias else {}
        if low_rank:
            shapes |= {"low_rank_in": (low_rank, in_features), "low_rank_out": (out_features, low_rank)}
        if frame_gate is not None:
            shapes[FRAME_GATE] = (frame_gate,)
        for name in ("bias", "low_rank_in", "low_rank_out", FRAME_GATE):
            empty = None
            if name in shapes:
                zeros = torch.zeros(shapes[name], dtype=self.compute_dtype, device=device)
                empty = nn.Parameter(zeros, requires_grad=False)
            self.register_parameter(name, empty)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        weight_scale: Tensor,
        bits: int,
        bias: Tensor | None = None,
        act_bits: int | None = None,
        act_clip: Tensor | tuple[float, float] | None = None,
        transforms: Iterable[Transform] = (),
        group_size: int | None = None,
        compute_dtype: torch.dtype | None = None,
        weight_format: str = "int",
        act_format: str = "int",
        levels: Tensor | None = None,
        branch: tuple[Tensor, Tensor] | None = None,
        rows: Sequence[RowKind] | None = None,
        row_kind: Tensor | None = None,
        act_groups: Sequence[int] | None = None,
        frame_gate: Tensor | None = None,
    ) -> PackedLinear:
        """A layer from integer codes (out, in) and scales (out, 1) or (out, in/group_size).

        The numbers that the codes stand for (formats.py) times the scale are the weight in the transformed basis,
        W̃ = W T^{-T}; for integers that is codes · scale. `compute_dtype`, the dtype of the model, defaults to the
        bias's, else float32. levels: (1 or out, 1 or groups, 2^bits) of the format "table". branch: (A (rank, in),
        B (out, rank)), on the layer's input. rows, row_kind (out,): the kinds of rows and which of them each row is;
        each row's codes are those of its kind, levels (numbers,) are those of all tables one after another, and `bits`
        are the widest kind's. act_groups: activation bits of each group of steps, of which `act_bits` are the widest.
        act_clip: (2,), or (groups, 2) of each group of steps. frame_gate: (frames,), of the branch.
        Raises AttarError for codes out of range, scales that are not finite, or zero, wrong shapes.
        """
        if codes.ndim != 2 or codes.is_floating_point():
            raise AttarError(f"codes must be an integer matrix, found {codes.dtype} {tuple(codes.shape)}")
        out_features, in_features = codes.shape
        if levels is not None:
            if levels.ndim != (3 if rows is None else 1):
                raise AttarError(f"levels has shape {tuple(levels.shape)}, expected rows, groups and entries")
            if rows is None:
                check_levels(levels, bits)
        own = None if levels is None or rows is not None else levels_of(levels)
        clip = None if act_clip is None else torch.as_tensor(act_clip, dtype=torch.float32).detach()
        layer = cls(
            in_features,
            out_features,
            bias is not None,
            weight_bits=bits,
            act_bits=act_bits,
            act_clip=act_clip is not None,
            group_size=group_size,
            transforms=copy.deepcopy(list(transforms)),  # q, k and v may be baked from one transform
            weight_format=weight_format,
            act_format=act_format,
            levels=own,
            low_rank=0 if branch is None else branch[0].shape[0],
            rows=None if rows is None else [astuple(kind) for kind in rows],
            act_groups=act_groups,
            frame_gate=None if frame_gate is None else frame_gate.numel(),
            clip_groups=len(clip) if clip is not None and clip.ndim > 1 else None,
            device="meta",
            dtype=compute_dtype or (bias.dtype if bias is not None else torch.float32),
        )
        weight_scale = weight_scale.detach().to(torch.float32, copy=True).contiguous()
        if weight_scale.shape != layer.weight_scale.shape:
            raise AttarError(
                f"weight_scale has shape {tuple(weight_scale.shape)}, "
                f"expected {tuple(layer.weight_scale.shape)}"
            )
        if not _usable(weight_scale):
            raise AttarError("weight_scale must be finite, and not zero")
        layer.weight_scale = weight_scale
        if layer.rows is None:
            layer.codes = pack(codes, bits)
        else:
            if row_kind is None or row_kind.shape != (out_features,):
                raise AttarError("which kind each row is has to be said for all rows")
            layer.row_kind = row_kind.detach().to(torch.uint8, copy=True)
            check_rows(layer.row_kind, layer.rows, levels)
            layer.codes = pack_rows(codes, layer.row_kind, layer.rows)
        if clip is not None:
            clip = clip.to(codes.device, copy=True)
            _check_clip(clip, layer.clip_groups)
            layer.act_clip = clip
        if levels is not None:
            layer.levels = _like("levels", levels, layer.levels, codes.device)
        floats = {"bias": bias}
        if branch is not None:
            floats |= {"low_rank_in": branch[0], "low_rank_out": branch[1], FRAME_GATE: frame_gate}
            if frame_gate is not None:
                _check_gate(frame_gate)
        for name, tensor in floats.items():
            if tensor is not None:
                value = _like(name, tensor, getattr(layer, name), codes.device)
                setattr(layer, name, nn.Parameter(value, requires_grad=False))
        for transform in layer.transforms:
            transform.to(codes.device)
        return layer

    @classmethod
    def from_scheme(
        cls,
        scheme: dict[str, Any],
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str = "meta",
        dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        """An empty layer of a checkpoint's scheme (see `scheme`). bias: whether the original layer has one."""
        return cls(
            in_features,
            out_features,
            bias or is_shifted(scheme["transforms"]),
            weight_bits=scheme["weight_bits"],
            act_bits=scheme["act_bits"],
            act_clip=scheme["act_clip"],
            group_size=scheme["group_size"],
            transforms=[transform_from_config(t, in_features, device) for t in scheme["transforms"]],
            **{key: scheme[key] for key in LATER if key in scheme},
            device=device,
            dtype=dtype,
        )

    def scheme(self) -> dict[str, Any]:
        """How the layer is quantized, as JSON-able values: with the widths, all that loading needs.

        Fields that the first version of the format did not have are left out where the layer does not need them.
        """
        frames = None if self.frame_gate is None else self.frame_gate.numel()
        return {
            "weight_bits": self.weight_bits,
            "act_bits": self.act_bits,
            "act_clip": self.act_clip is not None,
            "group_size": self.group_size,
            "transforms": [transform.config() for transform in self._chain()],
            **later_fields(
                self.weight_format,
                self.act_format,
                self.levels,
                self.low_rank,
                self.rows,
                self.act_groups,
                frames,
                self.clip_groups,
            ),
        }

    def forward(self, input: Tensor, gelu: str | None = None) -> Tensor:
        """`gelu`, "none" or "tanh" as torch names its approximations, gives GELU of the output, computed with it.

        It is GELU of the output before its rounding (`ops.packed_linear`); with gradients, of the rounded output.
        """
        if input.dtype not in _INPUTS:
            raise AttarError(
                f"an input of {input.dtype} is none of a linear layer", fix="Cast it to the model's dtype"
            )
        if input.shape[-1] != self.in_features:
            raise AttarError(
                f"an input of shape {tuple(input.shape)} does not fit {self.in_features} features"
            )
        if torch.is_grad_enabled() and (input.requires_grad or self._trains_bias()):
            y = _StraightThrough.apply(input, self.bias, self)
            return y if gelu is None else F.gelu(y, approximate=gelu)
        return self._run(input, gelu)

    def unpacked(self) -> Tensor:
        """The integer codes, int8 (out, in)."""
        return self._whole(lambda own: unpack(own.codes, own.kind.bits, self.in_features))

    def numbers(self) -> Tensor:
        """What the codes stand for, before their scales: float32 (out, groups, in/groups)."""
        groups = self.weight_scale.shape[1]
        return self._whole(
            lambda own: decode(
                unpack(own.codes, own.kind.bits, self.in_features).unflatten(1, (groups, -1)),
                own.kind.number, own.kind.bits, own.levels,
            )
        )  # fmt: skip

    def dequantized(self) -> Tensor:
        """The codes' numbers times the scale: the weight in the transformed basis, float32 (out, in)."""
        return (self.numbers() * self.weight_scale[..., None]).flatten(1)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight (out, in) in the original basis and the model's dtype. Read-only.

        Behind a channel shift the bias belongs to shifted inputs, so that weight and bias are not the layer, and with a
        gate over frames each frame has a weight of its own; what fuses projections by their `.data` gets an error. The
        branch is counted with a gate of one.
        """
        return computed_weight(
            self._dense_weight(),
            shifted=any(transform.kind == ChannelShift.kind for transform in self._chain()),
            gated=self.frame_gate is not None,
        )

    def branch(self, x: Tensor) -> Tensor | None:
        """What the low-rank branch adds for inputs x (..., in), in their dtype; None where there is none.

        Raises AttarError where a gate does not know the tokens' frames.
        """
        if self.low_rank_in is None or self.low_rank_out is None:
            return None
        return branch_product(x, self.low_rank_in.to(x.dtype), self.low_rank_out.to(x.dtype), self.frame_gate)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the input (..., in) for that of the output (..., out), of the dequantized layer."""
        if self.frame_gate is None or self.low_rank_in is None or self.low_rank_out is None:
            return grad @ self._dense_weight().to(grad.dtype)
        up, down = (part.to(grad.dtype).T for part in (self.low_rank_in, self.low_rank_out))
        weight = self._product_weight().to(self.compute_dtype)
        return grad @ weight.to(grad.dtype) + branch_product(grad, down, up, self.frame_gate)

    def settle(self, name: str) -> None:
        """Takes the model's dtype from the bias, after a library has filled the layer from a checkpoint.

        Raises AttarError, with the layer's name, when a float32 buffer was cast, and for values that no layer has.
        """
        for buffer, tensor in self.named_buffers():
            kept = torch.float16 if buffer.rsplit(".", 1)[-1] in ("levels", "shift") else torch.float32
            if tensor.is_floating_point() and tensor.dtype != kept:
                raise AttarError(f"{buffer} was cast to {tensor.dtype} while loading", where=name)
        try:
            if self.row_kind is not None and self.rows is not None and not self.row_kind.is_meta:
                check_rows(self.row_kind, self.rows, self.levels)
            elif self.levels is not None and not self.levels.is_meta:
                check_levels(self.levels, self.weight_bits)
            if self.frame_gate is not None and not self.frame_gate.is_meta:
                _check_gate(self.frame_gate)
            if self.act_clip is not None and not self.act_clip.is_meta:
                _check_clip(self.act_clip, self.clip_groups)
            for transform in self._chain():
                transform.check()
        except AttarError as error:
            raise AttarError(error.what, where=name) from error
        scale = self.weight_scale
        if not scale.is_meta and not _usable(scale):
            raise AttarError("a weight scale is not finite, or zero", where=name)
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
            self.compute_dtype = parameter.dtype

    def extra_repr(self) -> str:
        bits = "/".join(map(str, self.act_groups or (self.act_bits,)))
        acts = "float" if self.act_bits is None else f"{bits} bits per token"
        acts += "" if self.act_format == "int" else f" ({self.act_format})"
        acts += "" if self.clip_groups is None else f", clipping of {self.clip_groups} groups of steps"
        kind = "" if self.weight_format == "int" else f" ({self.weight_format})"
        kind += "" if self.rows is None else " at most"
        branch = f", low_rank={self.low_rank}" if self.low_rank else ""
        branch += "" if self.frame_gate is None else f", gate over {self.frame_gate.numel()} frames"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"weight={self.weight_bits} bits{kind} per {'row' if self.group_size is None else self.group_size}, "
            f"activation={acts}{branch}"
        )

    def _trains_bias(self) -> bool:
        bias = self._parameters["bias"]
        return bias is not None and bias.requires_grad

    def reset_parameters(self) -> None:
        """Raises AttarError: codes are not to be drawn anew, and a bias alone would be another layer."""
        raise AttarError(
            "a packed layer cannot be reset", fix="Reset the full-precision model, and compress it again"
        )

    def _dense_weight(self) -> Tensor:
        """The dequantized weight in the original basis, with the branch, in the dtype of the model."""
        weight = self._product_weight()
        if self.low_rank_in is not None and self.low_rank_out is not None:
            weight = weight + self.low_rank_out.to(weight.dtype) @ self.low_rank_in.to(weight.dtype)
        return weight.to(self.compute_dtype)

    def _product_weight(self) -> Tensor:
        """The dequantized weight in the original basis, without the branch; float32."""
        weight = self.dequantized()
        return restore_weight(self._chain(), weight) if len(self.transforms) else weight

    def _chain(self) -> list[Transform]:
        return list(self.transforms)  # type: ignore[arg-type]

    def _run(self, x: Tensor, gelu: str | None = None) -> Tensor:
        kinds: list[str] = []
        operands: list[Tensor] = []
        for transform in self._chain():
            kinds.append(transform.kind)
            operands += transform(None)
        # As attributes of a module each takes a microsecond, which small layers notice.
        own: dict[str, Any] = {**self._buffers, **self._parameters}
        act_bits, clip = self.acts_now(own["act_clip"])
        scale: Tensor = own["weight_scale"]
        bias: Tensor | None = own["bias"]
        down, up = own["low_rank_in"], own["low_rank_out"]

        def product(rows: Rows) -> Tensor:
            wide = rows.of(up)
            branch = None if low is None or wide is None else (low, wide.to(x.dtype))
            return packed_linear(
                x, rows.codes, rows.of(scale), rows.of(bias), clip, rows.kind.bits, act_bits,
                kinds, operands, gelu, rows.kind.number, self.act_format, rows.levels, branch,
            )  # fmt: skip

        with full_precision(x.device):  # autocast would round the integers and the scales
            low = None if down is None else branch_low(x, down.to(x.dtype), own["frame_gate"])
            return self._whole(product, -1)

    def _kinds(self) -> list[Rows]:
        """The rows by their kinds; one kind alone has them all."""
        own: dict[str, Any] = self._buffers
        codes, levels = own["codes"], own["levels"]
        if self.rows is None:
            kind = RowKind(self.weight_bits, self.weight_format, self.out_features)
            return [Rows(kind, None, codes, levels)]
        return split_rows(codes, own["row_kind"], self.rows, self.in_features, levels)

    def _whole(self, make: Callable[[Rows], Tensor], dim: int = 0) -> Tensor:
        """What `make` gives for each kind of rows, with all rows in their places along `dim`."""
        kinds = self._kinds()
        if self.rows is None:
            return make(kinds[0])
        parts = [make(own) for own in kinds]
        shape = list(parts[0].shape)
        shape[dim] = self.out_features
        whole = parts[0].new_empty(shape)
        for own, part in zip(kinds, parts, strict=True):
            assert own.places is not None
            whole.index_copy_(dim, own.places, part)
        return whole

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # Without a weight Parameter, a layer with no bias would forget the dtype that its model was cast to.
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.codes.device))
        super()._apply(fn, recurse)
        self.compute_dtype = probe.dtype
        return self


class _StraightThrough(torch.autograd.Function):
    """Forward of the packed layer; backward as of the floating-point linear of the dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer = layer  # whose bias it is: an argument, so that it gets its gradient
        return layer._run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        of_x, of_bias, _ = ctx.needs_input_grad
        return (
            ctx.layer.input_gradient(grad) if of_x else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if of_bias else None,
            None,
        )


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed layer of `model` by its dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def _like(name: str, value: Tensor, empty: Any, device: torch.device) -> Tensor:
    """A copy of `value` in the type of the empty tensor that it fills."""
    if value.shape != empty.shape:
        raise AttarError(f"{name} has shape {tuple(value.shape)}, expected {tuple(empty.shape)}")
    return value.detach().to(device=device, dtype=empty.dtype, copy=True)


def _check_clip(clip: Tensor, groups: int | None) -> None:
    shape = (2,) if groups is None else (groups, 2)
    if clip.shape != shape or not bool((torch.isfinite(clip) & (clip >= 0)).all()):
        each = "" if groups is None else f" for each of {groups} groups of steps"
        raise AttarError(f"act_clip must be two finite factors (f_lo, f_hi){each}, not negative")


def _check_gate(gate: Tensor) -> None:
    if not bool(torch.isfinite(gate).all()):
        raise AttarError("the gate over frames is not finite")


def _usable(scale: Tensor) -> bool:
    """Whether a weight can have these scales, of either sign."""
    return bool((torch.isfinite(scale) & (scale != 0)).all())
