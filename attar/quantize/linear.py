"""A linear layer while it is being quantized: learnable transforms and clipping, then baking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.errors import AttarError
from attar.quantize.product import quantized_acts, quantized_product
from attar.quantize.recompute import recomputed
from attar.quantize.terms import LowRankTerm
from attar.quantize.transforms import LearnedTransform, Matrices
from attar.quantize.weights import Grid, WeightQuantizer
from attar.runtime.autocast import as_linear, full_precision
from attar.runtime.branch import branch_product
from attar.runtime.formats import check_format, decode, wide
from attar.runtime.layers import PackedLinear
from attar.runtime.reference import quantize_tokens
from attar.runtime.step_groups import GroupedActs, check_act_groups, check_clip_groups
from attar.runtime.transform import half
from attar.runtime.transforms import ChannelShift, Transform, restore_weight, transform_weight


@dataclass
class _Frozen:
    transforms: list[Transform]
    codes: Tensor  # (out, in) int8
    scale: Tensor  # (out, groups) float32
    weight: Tensor  # (out, in), codes · scale
    act_clip: Tensor | None  # (2,), or (groups of steps, 2)
    branch: tuple[Tensor, Tensor] | None  # (rank, in) and (out, rank), in the dtype of the model
    bias: Tensor | None  # (out,)


class QuantizedLinear(GroupedActs, nn.Module):
    """ŷ = Q_a((x - z) T; a⁻, a⁺) · Q_w(W T^{-T}; g⁻, g⁺)ᵀ + W z + b around one nn.Linear (S²Q-VDiT's base, FlatQuant).

    linear: the layer; its weight and bias are shared, not copied, and not trained here.
    weight_bits: those of the format, 2..16 of integers (up to 8 can be packed). act_bits: the same, or None for a
    weight-only layer. act_groups: those of each group of denoising steps, of which `act_bits` are the widest, or None
    for the same in all. clip_groups: how many groups of steps have clipping factors of their own, None for one pair in
    all. Who runs the layer says which group its input is of (`choose_group`).
    transforms: learnable transforms in the order in which they act on x.
    shift: z (in,), what is taken from the input first, or None. The bias gets it with the weight before rounding, so
    that what rounding does to the mean of the inputs is none of the error. A weight-only layer with a bias is packed
    without it: its bias makes up for what the rounding does to z (bias correction, arXiv 1906.04721).
    group_size: None for one scale per output channel, else scales per group of input channels (weight-only).
    weight_clip, act_clip: whether the clipping factors σ(g) are learned; σ(4) = 0.982 at first.
    weight_format: "int", "full_range", "fp8" or a table (tables.py), which is fitted to the weight as the
    transforms start. train_levels: whether the parameters of the table, such as the exponent of "power", are
    learned from there on. act_format: "int", "full_range" or "fp8". A low-rank branch beside the quantized product
    comes from `set_branch`, its gate over frames from `set_gate`, rows of several kinds from `mix_rows`. Who trains the
    layer end to end may set `adapter` and `auxiliary`, and let the weight and the bias have gradients.
    deployed: the type that a branch will have in the packed layer, None for that of the weight. Where it is a narrower
    one, the branch counts everywhere as what is left of it there, and learns as if nothing were lost.
    The switches `weight_quant` and `act_quant` turn the quantizers off while the layer learns: with both off
    the layer equals its linear. `freeze()` fixes everything; the frozen layer computes what the packed
    layer of `bake()` does.
    Raises AttarError for bits out of range, and for group scales together with quantized activations.
    """

    def __init__(
        self,
        linear: nn.Linear,
        weight_bits: int,
        act_bits: int | None,
        transforms: Iterable[LearnedTransform] = (),
        *,
        group_size: int | None = None,
        weight_clip: bool = True,
        act_clip: bool = True,
        clip_start: float = 4.0,
        weight_format: str = "int",
        act_format: str = "int",
        train_levels: bool = False,
        shift: Tensor | None = None,
        act_groups: Sequence[int] | None = None,
        clip_groups: int | None = None,
        deployed: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if act_bits is not None:
            check_format(act_format, act_bits)
            if group_size is not None:
                raise AttarError(
                    "group scales cannot be combined with activation quantization",
                    fix="Use one scale per output channel, or weights only",
                )
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.act_bits, self.group_size, self.act_format = act_bits, group_size, act_format
        self.act_groups = None if act_groups is None else check_act_groups(act_groups, act_bits, act_format)
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self._has_bias = linear.bias is not None  # training may give one to a layer that has none
        device = linear.weight.device
        grid = Grid(weight_bits, weight_format)
        start = clip_start if weight_clip else None
        size = (self.out_features, self.in_features)
        self.quantizer = WeightQuantizer(grid, *size, group_size, start, train_levels).to(device)
        self.transforms = nn.ModuleList(transforms).to(device)  # type: ignore[arg-type]
        self.shift: Tensor | None
        self.register_buffer("shift", None if shift is None else half(shift).float().to(device))
        self.act_clip_logit = None
        clipped = act_clip and act_bits is not None
        if clip_groups is not None and act_bits is not None:
            self.clip_groups = check_clip_groups(clip_groups, clipped, self.act_groups)
        if clipped:
            pairs = (2,) if self.clip_groups is None else (self.clip_groups, 2)
            self.act_clip_logit = nn.Parameter(torch.full(pairs, clip_start, device=device))
        self.weight_quant, self.act_quant = True, act_bits is not None
        self.branch_in = self.branch_out = None
        self.deployed = deployed
        self.branch_subtracted = True
        self.frame_gate: nn.Parameter | None = None
        self.gate_trained = False
        self.adapter: LowRankTerm | None = None  # added to the weight before anything else, and kept
        self.auxiliary: LowRankTerm | None = (
            None  # added to the rounded weight, and gone before the layer is packed
        )
        self._frozen: _Frozen | None = None
        self._cache: tuple[tuple, tuple[list[Matrices], Tensor, Tensor | None]] | None = None
        if grid.number == "table":
            self.quantizer.fit(self.transformed_weight())

    @property
    def weight_bits(self) -> int:
        """Of all rows, or on average of rows of several kinds."""
        return self.quantizer.grid.bits

    @property
    def levels(self) -> Tensor | None:
        """The numbers of a table, (1 or out, 1 or groups, 2^bits), exact in half precision; None without one, and for
        rows of several kinds."""
        return self.quantizer.levels

    def search_clip(self) -> None:
        """Starts the clipping of the weight where rounding it errs least (`WeightQuantizer.search_clip`)."""
        self.quantizer.search_clip(self.transformed_weight())
        self._cache = None

    def mix_rows(self, grids: Sequence[Grid], row_grid: Tensor) -> None:
        """Gives row r the grid `grids[row_grid[r]]`, as `WeightQuantizer.mix`; tables are those of the weight now."""
        self.quantizer.mix(grids, row_grid)
        self.quantizer.fit(self.transformed_weight())
        self._cache = None

    # ----------------------------------------------------------------------------------- low-rank branch

    @torch.no_grad()
    def transformed_weight(self) -> Tensor:
        """W̃ (out, in) with the transforms as they are now, without the branch, before rounding."""
        return self._transformed_weight([transform.matrices() for transform in self.transforms])  # type: ignore[operator]

    @torch.no_grad()
    def rounded(self, weight: Tensor) -> Tensor:
        """What the weight quantizer, as it is now, makes of a weight in the transformed basis."""
        return self.quantizer(weight)

    @torch.no_grad()
    def to_original(self, rows: Tensor) -> Tensor:
        """Rows (n, in) that act on transformed inputs, as rows that do the same to inputs as they come."""
        baked = [transform.bake() for transform in self.transforms]  # type: ignore[operator]
        return restore_weight(baked, rows).to(rows.dtype)

    def set_branch(self, down: Tensor, up: Tensor, subtract: bool = True) -> None:
        """Puts the branch y += (x Aᵀ) Bᵀ beside the layer; what is quantized from now on is W - B A.

        down A: (rank, in), up B: (out, rank), on the layer's input as it comes. They are kept in the dtype of the
        weight. subtract: False quantizes W whatever the branch is. Raises AttarError for a branch that does not fit,
        or has numbers that are infinite as they are deployed.
        """
        rank = down.shape[0]
        if down.shape != (rank, self.in_features) or up.shape != (self.out_features, rank):
            raise AttarError(
                f"a branch of {tuple(down.shape)} and {tuple(up.shape)} does not fit {self.in_features} -> "
                f"{self.out_features}"
            )
        self.branch_in, self.branch_out = (
            nn.Parameter(t.detach().to(self.weight.dtype).contiguous(), requires_grad=False)
            for t in (down, up)
        )
        self.branch_subtracted = subtract
        self.frame_gate = None
        self._cache = None
        self._finite_branch()

    def set_gate(self, gate: Tensor, trained: bool) -> None:
        """Multiplies what the branch adds to the tokens of frame i with gate[i]. gate: (frames,), in the type of the
        branch; from here on inputs are (B, N, in) with N tokens, frame after frame. trained: whether it is one of
        `branch_parameters`. Raises AttarError without a branch, or with one that is subtracted."""
        if self._branch() is None or self.branch_subtracted:
            raise AttarError(
                "a gate over frames needs a branch that is not subtracted from the weight",
                where="quantize.low_rank.gate",
                fix="Set quantize.low_rank.subtract to false",
            )
        self.frame_gate = nn.Parameter(gate.detach().to(self.weight.dtype), requires_grad=False)
        self.gate_trained = trained

    # ------------------------------------------------------------------------------------------ learning

    def forward(self, x: Tensor) -> Tensor:
        if self._frozen is not None:
            return self._forward_frozen(x, self._frozen)
        with full_precision(x.device):
            matrices, weight, bias = self._evaluated()
            act_bits, clip = self.acts_now(self._act_clip()) if self.act_quant else (None, None)
        transform = partial(self._transform, matrices=matrices)
        return self._by_rows(x, transform, act_bits, clip, weight, bias)

    def transform_input(self, x: Tensor) -> Tensor:
        """x̃ = (x - z) T: what the quantizer sees, and what GPTQ's Hessian is made of."""
        if self._frozen is not None:
            for transform in self._frozen.transforms:
                x = transform(x)
            return wide(x)
        return self._transform(x, self._evaluated()[0])

    @torch.no_grad()
    def quantized_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x̃, what the quantizer sees, and Q_a(x̃), which is x̃ where activations stay in floating point."""
        y = self.transform_input(x)
        clip = self._act_clip() if self._frozen is None else self._frozen.act_clip
        return y, quantized_acts(y, *self.acts_now(clip), self.act_format)

    def transform_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of scales and rotations."""
        return [p for p in self.transforms.parameters() if p.requires_grad]

    def clip_parameters(self) -> list[nn.Parameter]:
        """The logits of the clipping factors."""
        return [p for p in (self.quantizer.clip_logit, self.act_clip_logit) if p is not None]

    def group_parameters(self) -> list[nn.Parameter]:
        """Those of `clip_parameters` that have a row for each group of denoising steps, of which a step uses one."""
        return [] if self.act_clip_logit is None or self.clip_groups is None else [self.act_clip_logit]

    def level_parameters(self) -> list[nn.Parameter]:
        """What the levels of a table depend on, where that is trained."""
        return self.quantizer.table_parameters()

    def branch_parameters(self) -> list[nn.Parameter]:
        """A and B of the low-rank branch, and its gate where that is trained."""
        gate = self.frame_gate if self.gate_trained else None
        return [p for p in (self.branch_in, self.branch_out, gate) if p is not None]

    def _evaluated(self) -> tuple[list[Matrices], Tensor, Tensor | None]:
        """The transforms' matrices, the (fake-quantized) weight W̃ and the bias, evaluated once in a forward pass.

        Without gradients, as in the loss evaluations between epochs, they are kept until a parameter changes.
        """
        if torch.is_grad_enabled():
            self._cache = None
            return recomputed(self._evaluate, size=self.weight.numel())
        key = (self.weight_quant, *((p.data_ptr(), p._version) for p in self.parameters()))
        if self._cache is None or self._cache[0] != key:
            self._cache = key, self._evaluate()
        return self._cache[1]

    def _evaluate(self) -> tuple[list[Matrices], Tensor, Tensor | None]:
        matrices = [transform.matrices() for transform in self.transforms]  # type: ignore[operator]
        rest = self._rest(wide(self.weight))
        weight = self._transformed_weight(matrices, rest)
        weight = self.quantizer(weight) if self.weight_quant else weight
        weight = weight if self.auxiliary is None else weight + self.auxiliary()
        return matrices, weight, self._shifted_bias(rest)

    def _shifted_bias(self, rest: Tensor) -> Tensor | None:
        """b + (W - B A) z: a branch works on the input as it comes. rest: what is quantized."""
        if self.shift is None:
            return self.bias
        branch, shift = self._branch(), self.shift.to(rest.dtype)
        found = rest @ shift
        if branch is not None and not self.branch_subtracted:
            down, up = (part.to(rest.dtype) for part in branch)
            found = found - up @ (down @ shift)
        return found if self.bias is None else found + self.bias.to(rest.dtype)

    def _final_bias(self, less: Tensor | float = 0.0) -> Tensor | None:
        """The bias of shifted inputs, less something (out,), in the dtype of the model."""
        if self.shift is None:
            return self.bias
        shifted = self._shifted_bias(self._rest(self.weight.double()))
        return None if shifted is None else (shifted - less).to(self.weight.dtype)

    def _transformed_weight(self, matrices: list[Matrices], rest: Tensor | None = None) -> Tensor:
        weight = self._rest(wide(self.weight)) if rest is None else rest
        for transform, m in zip(self.transforms, matrices, strict=True):
            weight = transform.weight_side(weight, m)  # type: ignore[operator]
        return weight

    def _transform(self, x: Tensor, matrices: list[Matrices]) -> Tensor:
        x = wide(x) if self.shift is None else wide(x) - self.shift
        for transform, m in zip(self.transforms, matrices, strict=True):
            x = transform(x, m)
        return x

    def _by_rows(
        self,
        x: Tensor,
        transform: Callable[[Tensor], Tensor],
        act_bits: int | None,
        clip: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """The layer with what is given, differentiable in all of it."""
        quantize = partial(quantized_acts, bits=act_bits, clip=clip, number=self.act_format)
        return quantized_product(
            x, transform, quantize, weight, bias, self._added, self.frame_gate is not None
        )

    def _added(self, x: Tensor) -> Tensor | None:
        """What the branch makes of the input x as it came."""
        branch = self._branch()
        if branch is None:
            return None
        down, up = (part.to(x.dtype) for part in branch)
        return branch_product(x, down, up, self.frame_gate)

    def _branch(self) -> tuple[Tensor, Tensor] | None:
        """(A, B) of the low-rank branch with the numbers that it is deployed with, if there is one."""
        if self.branch_in is None or self.branch_out is None:
            return None
        return self._deployed(self.branch_in), self._deployed(self.branch_out)

    def _finite_branch(self) -> tuple[Tensor, Tensor] | None:
        """`_branch`. AttarError where a number is infinite in the type of the packed layer; float16 ends at 65504."""
        branch = self._branch()
        if branch is not None and not all(bool(torch.isfinite(part).all()) for part in branch):
            kind = str(self.deployed or self.weight.dtype).removeprefix("torch.")
            raise AttarError(
                f"a low-rank branch has numbers that are not finite in {kind}",
                fix="Compress the model in bfloat16 or float32, or without a branch (quantize.low_rank)",
            )
        return branch

    def _deployed(self, part: Tensor) -> Tensor:
        if self.deployed in (None, part.dtype):
            return part
        return part + (part.to(self.deployed).to(part.dtype) - part).detach()  # exact; the gradient passes

    def _rest(self, weight: Tensor) -> Tensor:
        """What of the weight is quantized: W - B A, or W where the branch is not subtracted; W with its adapter."""
        if self.adapter is not None:
            weight = weight + self.adapter().to(weight.dtype)
        branch = self._branch()
        if branch is None or not self.branch_subtracted:
            return weight
        down, up = (part.to(weight.dtype) for part in branch)
        return weight - up @ down

    def _act_clip(self) -> Tensor | None:
        """Of all groups of steps."""
        return None if self.act_clip_logit is None else self.act_clip_logit.sigmoid()

    # ------------------------------------------------------------------------------------------- freezing

    @torch.no_grad()
    def baked_weight(self, clipped: bool = False) -> tuple[Tensor, Tensor]:
        """W̃ (out, in) and its scales (out, groups), float32, with the transforms as they will be deployed.

        The transforms are rounded to float32 and the weight side is computed from them in float64. `clipped`
        clamps W̃ to its learned range. These are GPTQ's arguments: its scales must stay those of the clipping.
        """
        transforms = self._baked_transforms()
        weight = transform_weight(transforms, self._rest(self.weight.double())).float()
        scale = self.quantizer.quantize(weight)[1]
        return (self.quantizer.clipped(weight) if clipped else weight), scale

    @torch.no_grad()
    def freeze(self, codes: Tensor | None = None, scales: Tensor | None = None) -> None:
        """Fixes transforms, clipping and codes.

        codes: (out, in) for the scales of `baked_weight`, e.g. from GPTQ; by default the weight is rounded to
        nearest. scales: (out, groups) that the codes were learned with, in place of those. Raises AttarError for codes
        of a wrong shape or range, scales without codes or of a wrong shape, a branch that is not finite as it is
        deployed, and while there is an auxiliary branch.
        """
        if self.auxiliary is not None:
            raise AttarError(
                f"an auxiliary branch of rank {self.auxiliary.rank} is left, which a packed layer cannot have",
                fix="Train until its rank has decayed to 0",
            )
        branch = self._finite_branch()
        weight, scale = self.baked_weight()
        if scales is not None:
            if codes is None or scales.shape != scale.shape:
                raise AttarError(
                    f"scales of shape {tuple(scales.shape)} need codes, and the shape {tuple(scale.shape)}"
                )
            scale = scales
        if codes is None:
            codes = self.quantizer.quantize(weight)[0]
        if codes.shape != weight.shape:
            raise AttarError(f"codes of shape {tuple(codes.shape)} do not fit {tuple(weight.shape)}")
        fake = self.quantizer.decode(codes, scale)
        transforms = [transform.to(weight.device) for transform in self._baked_transforms()]
        bias = self._final_bias()
        self._frozen = _Frozen(transforms, codes, scale, fake, self._act_clip(), branch, bias)
        self._cache = None

    def unfreeze(self) -> None:
        """Back to the learnable form."""
        self._frozen = None

    @property
    def is_frozen(self) -> bool:
        return self._frozen is not None

    @property
    def codes(self) -> Tensor:
        """(out, in), of a frozen layer. Raises AttarError for another."""
        return self._fixed().codes

    def forward_with(self, x: Tensor, weight: Tensor) -> Tensor:
        """The frozen layer with another weight W̃ (out, in), differentiable in it and in x."""
        frozen = self._fixed()
        act_bits, clip = self.acts_now(frozen.act_clip)
        return self._by_rows(x, self.transform_input, act_bits, clip, weight, frozen.bias)

    def _fixed(self) -> _Frozen:
        if self._frozen is None:
            raise AttarError("the layer has no codes yet", fix="Call freeze")
        return self._frozen

    def bake(self, codes: Tensor | None = None, scales: Tensor | None = None) -> PackedLinear:
        """The packed layer with the frozen layer's values.

        codes, scales: as in `freeze`, which this calls when they are given or the layer is not frozen yet.
        Raises AttarError for more than 8 bits.
        """
        if codes is not None or self._frozen is None:
            self.freeze(codes, scales)
        frozen = self._frozen
        assert frozen is not None
        transforms, bias = frozen.transforms, frozen.bias
        if self.shift is not None and self.act_bits is None and self._has_bias:
            # what stays as it comes needs no shift: Ŵ T (x - z) + b = Ŵ T x + (b - Ŵ T z)
            less = -self.transform_input(torch.zeros_like(self.shift)[None])[0]
            transforms, bias = transforms[1:], self._final_bias(frozen.weight.double() @ less.double())
        return PackedLinear.from_codes(
            frozen.codes,
            frozen.scale,
            bias=bias,
            act_bits=self.act_bits,
            act_clip=frozen.act_clip,
            transforms=transforms,
            group_size=self.group_size,
            compute_dtype=self.weight.dtype,
            act_format=self.act_format if self.act_bits is not None else "int",
            branch=frozen.branch,
            frame_gate=self.frame_gate,
            act_groups=self.act_groups,
            **self.quantizer.stored(),
        )

    def _baked_transforms(self) -> list[Transform]:
        if self._frozen is not None:
            return self._frozen.transforms
        shift = [] if self.shift is None else [ChannelShift(self.shift)]
        return [*shift, *(transform.bake() for transform in self.transforms)]  # type: ignore[operator]

    def _forward_frozen(self, x: Tensor, frozen: _Frozen) -> Tensor:
        with full_precision(x.device):
            y = self.transform_input(x)
            act_bits, clip = self.acts_now(frozen.act_clip)
            if act_bits is not None:
                codes, scale = quantize_tokens(y, act_bits, clip, self.act_format)
                y = decode(codes, self.act_format, act_bits) * scale
        weight, bias = frozen.weight.to(y.dtype), frozen.bias
        z = as_linear(F.linear(y, weight, None if bias is None else bias.to(weight.dtype)), x)
        added = self._added(x)
        return z if added is None else z + added

    def extra_repr(self) -> str:
        bits = "/".join(map(str, self.act_groups or (self.act_bits,)))
        acts = "float" if self.act_bits is None else f"{bits} bits"
        return f"{self.in_features} -> {self.out_features}, weight={self.weight_bits} bits, activation={acts}"


def parameter_groups(layers: Iterable[nn.Module]) -> dict[str, list[nn.Parameter]]:
    """Parameters of all QuantizedLinears among `layers`: {"transform", "clip", "levels", "branch": […]}; beside "clip"
    "group_clip" where clipping factors are by groups of steps."""
    found = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    by_group = [p for layer in found for p in layer.group_parameters()]
    apart = {id(p) for p in by_group}
    return {
        "transform": [p for layer in found for p in layer.transform_parameters()],
        "clip": [p for layer in found for p in layer.clip_parameters() if id(p) not in apart],
        **({"group_clip": by_group} if by_group else {}),
        "levels": [p for layer in found for p in layer.level_parameters()],
        "branch": [p for layer in found for p in layer.branch_parameters()],
    }


def replace_module(root: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Puts `new` where the dotted `name` points below `root`; returns what was there."""
    parent_name, _, child = name.rpartition(".")
    parent = root.get_submodule(parent_name)
    old = parent.get_submodule(child)
    if isinstance(parent, (nn.ModuleList, nn.Sequential)):
        parent[int(child)] = new
    else:
        setattr(parent, child, new)
    return old


def quantized_linears(block: nn.Module) -> dict[str, QuantizedLinear]:
    """Every QuantizedLinear below `block` by its dotted name."""
    return {name: m for name, m in block.named_modules() if isinstance(m, QuantizedLinear)}


def set_quantizers(layers: Sequence[QuantizedLinear], weights: bool, acts: bool) -> None:
    """Turns the quantizers of layers that still learn on or off."""
    for layer in layers:
        layer.weight_quant, layer.act_quant = weights, acts and layer.act_bits is not None
