"""Which layers are quantized, to how many bits, and what that will weigh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

from torch import nn

from attar.errors import AttarError
from attar.quantize.formats import group_count
from attar.quantize.initialize import TransformSettings
from attar.quantize.low_rank import LowRankSettings
from attar.quantize.row_bits import RowBitsSettings
from attar.quantize.tables import check_weight_format, least_bits, own_tables
from attar.quantize.transforms import check_rotation, kronecker_factors
from attar.runtime.block_rotations import block_width
from attar.runtime.formats import INTEGER_FORMATS, check_format
from attar.runtime.hadamard import base_order
from attar.runtime.packing import packed_width
from attar.runtime.patches import PARTS, open_layers, split_sizes

# Of all layers, those whose inputs make an adaptive rotation the dual one: about 5 % in LRQ-DiT's models.
SALIENT_SHARE = 0.05
KEEP = 16  # the bit width that means "leave it in full precision"
# roles of layers whose input is a single token, from which all others are steered
ONE_TOKEN = {"modulation": "modulation", "resnet.time": "time projection"}
_OVERRIDE_KEYS = {"weights", "acts", "skip"}


class NamedLinear(Protocol):
    """A linear layer as the model adapter describes it."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def role(self) -> str: ...
    @property
    def kept(self) -> str | None: ...


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one linear layer.

    name: dotted name from the transformer's root. role: "self_attn.q", "ffn.up", "modulation", …
    weight_bits: 1..8, or None when the layer is left as it is. act_bits: 2..8, or None for floating-point
    activations. act_groups: bits of each group of denoising steps, noisiest first, where these differ; `act_bits` are
    the widest then. reason: why the layer is treated differently from the default, or None. group_size: input
    channels to a scale, only for floating-point activations; None for one scale per output channel.
    weight_format, act_format: of the numbers, see tables.py and attar.runtime.formats. low_rank: rank of a branch in
    high precision beside the product, 0 for none. row_bits: how its rows get one bit more or less, at `weight_bits` on
    average; None for as many in all.
    plain: rounded to nearest, with no transforms, no clipping and no GPTQ.
    one_token: its input is a single token, which stays in floating point.
    """

    name: str
    role: str
    weight_bits: int | None
    act_bits: int | None
    reason: str | None
    in_features: int
    out_features: int
    bias: bool
    group_size: int | None = None
    plain: bool = False
    one_token: bool = False
    weight_format: str = "int"
    act_format: str = "int"
    low_rank: int = 0
    row_bits: RowBitsSettings | None = None
    act_groups: tuple[int, ...] | None = None

    @property
    def skipped(self) -> bool:
        return self.weight_bits is None

    @property
    def transformed(self) -> bool:
        """Whether a channel scale and a rotation stand before it; a lone token in floating point needs none."""
        return not (self.skipped or self.plain or self.one_token)

    @property
    def numbers(self) -> tuple[str, str]:
        """The formats of weights and activations, as a backend knows them: all integer weights are packed alike."""
        return "int" if self.weight_format in INTEGER_FORMATS else self.weight_format, self.act_format

    @property
    def bits(self) -> str:
        """ "kept", "W4A6", "W4A16", "W4A16g64" with a scale for 64 input channels, or "W4±1A6" with rows of 3 to 5,
        or "W4A8/6" where the activations have eight bits in the first group of steps and six in the second."""
        if self.skipped:
            return "kept"
        groups = f"g{self.group_size}" if self.group_size else ""
        kinds = {self.weight_format, self.act_format} - {*INTEGER_FORMATS}
        weights = f"W{self.weight_bits}" + ("" if self.row_bits is None else "±1")
        acts = "/".join(map(str, self.act_groups or (self.act_bits or KEEP,)))
        return f"{weights}A{acts}{groups}{''.join(f'-{kind}' for kind in sorted(kinds))}"


@dataclass(frozen=True)
class Forecast:
    """Bytes of one layer, or of several added up: bfloat16, and packed with scales, transforms and bias."""

    dense: int
    packed: int

    def __add__(self, other: Forecast) -> Forecast:
        return Forecast(self.dense + other.dense, self.packed + other.packed)


@dataclass(frozen=True)
class Rules:
    """What is said of all layers of a model.

    weights: 2..8, 1 for formats that have it, or 16 to keep every layer. acts: 2..8, or 16 or None for weights only, or
    a list of 2..8 for each of the `step_groups` groups of denoising steps, noisiest first; so in overrides.
    overrides: {pattern: {"weights": bits, "acts": bits, "skip": bool}}; a pattern is a role or a dotted
    name, with the wildcards of a shell (`cross_attn.*`, `blocks.0.*`); later ones win, key by key.
    group_size: input channels to a scale in weight-only layers; a layer whose width it does not divide gets one
    scale per output channel, and its reason says so.
    weight_format, act_format: of all planned layers. low_rank, row_bits: of those that are not plain; layers of 8 bits
    have as many in all rows. calibrate_modulation: whether modulation is rounded as other weights are.
    """

    weights: int
    acts: int | Sequence[int] | None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    group_size: int | None = None
    weight_format: str = "int"
    act_format: str = "int"
    low_rank: LowRankSettings | None = None
    row_bits: RowBitsSettings | None = None
    step_groups: int = 1
    calibrate_modulation: bool = False


def plan_layers(
    linears_in_blocks: Iterable[NamedLinear], outside_linears: Iterable[NamedLinear], rules: Rules
) -> list[LayerPlan]:
    """The plan of every linear layer of a transformer, in the order given.

    Defaults (S²Q-VDiT; the modulation rule is ours, its inputs being a single token whose error reaches all
    others): linears in blocks get `weights` and `acts` bits; modulation, and in a U-Net the projections of the time,
    get `weights` bits with floating-point activations; linears outside blocks, and the embedding of time where blocks
    have one, stay as they are, or become weight-only by an override. Linears outside blocks are plain, since no
    calibration data passes there; so is modulation with floating-point activations, unless `calibrate_modulation`
    rounds its weights as those of others, on the tokens that the samples have.
    Raises AttarError for bits out of range, unknown keys, patterns that match no layer, and groups that no layer has.
    """
    least = {"weights": least_bits(rules.weight_format), "acts": 2}
    _check_bits(rules.weights, "weights", None, least)
    _check_acts(rules.acts, None, rules.step_groups)
    for pattern, options in rules.overrides.items():
        if not isinstance(options, Mapping) or set(options) - _OVERRIDE_KEYS:
            raise AttarError(f"an override knows weights, acts and skip, got {options!r}", where=pattern)
        if "weights" in options:
            _check_bits(options["weights"], "weights", pattern, least)
        if "acts" in options:
            _check_acts(options["acts"], pattern, rules.step_groups)
        if not isinstance(options.get("skip", False), bool):
            raise AttarError("skip is true or false", where=pattern)

    unmatched = set(rules.overrides)
    plans = []
    for linear, inside in [(x, True) for x in linears_in_blocks] + [(x, False) for x in outside_linears]:
        chosen: dict[str, Any] = {}
        last = None
        for pattern, options in rules.overrides.items():
            if fnmatchcase(linear.role, pattern) or fnmatchcase(linear.name, pattern):
                unmatched.discard(pattern)
                chosen.update(options)
                last = pattern
        plan = _with_formats(_plan(linear, inside, rules, chosen, last), rules)
        plans.append(_with_branch(plan, rules.low_rank))
    if unmatched:
        roles = sorted({plan.role for plan in plans})
        raise AttarError(
            "an override matches no layer", where=sorted(unmatched)[0], fix=f"Roles here: {', '.join(roles)}"
        )
    _check_parts(plans)
    planned = [plan for plan in plans if not plan.skipped]
    if rules.group_size is not None and planned and all(plan.act_bits is not None for plan in planned):
        raise AttarError(
            "groups are for layers with floating-point activations, and there is none",
            where="group_size",
            fix="Leave it out, or keep activations at 16 bits",
        )
    return plans


def _check_parts(plans: Iterable[LayerPlan]) -> None:
    """The parts of a split layer take its place together."""
    kept: dict[str, bool] = {}
    for plan in plans:
        place, parts, _ = plan.name.rpartition(PARTS)
        if parts and kept.setdefault(place, plan.skipped) != plan.skipped:
            raise AttarError(
                "one part of a split layer is kept and another is not",
                where=plan.name,
                fix=f"Name all parts: {place}{PARTS}*",
            )


def _with_formats(plan: LayerPlan, rules: Rules) -> LayerPlan:
    if plan.weight_bits is None:
        return plan
    row_bits = None if plan.plain or plan.weight_bits == 8 else rules.row_bits
    try:
        check_weight_format(rules.weight_format, plan.weight_bits)
        for bits in plan.act_groups or (plan.act_bits,):
            if bits is not None:
                check_format(rules.act_format, bits)
        if row_bits is not None:
            if plan.group_size is not None:
                raise AttarError("rows of several widths have one scale each", fix="Leave group_size out")
            row_bits.grids(plan.weight_bits, rules.weight_format)
    except AttarError as error:
        raise AttarError(error.what, where=plan.name, fix=error.fix) from error
    return replace(
        plan,
        weight_format=rules.weight_format,
        act_format="int" if plan.act_bits is None else rules.act_format,
        row_bits=row_bits,
    )


def _with_branch(plan: LayerPlan, low_rank: LowRankSettings | None) -> LayerPlan:
    if low_rank is None or plan.skipped or plan.plain:
        return plan
    try:
        rank = low_rank.rank_for(plan.in_features, plan.out_features, plan.act_bits)
    except AttarError as error:
        raise AttarError(error.what, where=plan.name, fix=error.fix) from error
    return replace(plan, low_rank=rank)


def matching(plans: Iterable[LayerPlan], patterns: Sequence[str]) -> list[str]:
    """Names of the planned layers whose role or name one of the patterns fits, with the wildcards of a shell.

    Raises AttarError for a pattern that fits none.
    """
    planned = [plan for plan in plans if not plan.skipped]
    found = []
    for pattern in patterns:
        fits = [p.name for p in planned if fnmatchcase(p.role, pattern) or fnmatchcase(p.name, pattern)]
        if not fits:
            roles = sorted({plan.role for plan in planned})
            raise AttarError(
                "no quantized layer is called so", where=pattern, fix=f"Roles here: {', '.join(roles)}"
            )
        found += fits
    return list(dict.fromkeys(found))


def open_planned(module: nn.Module, plans: Mapping[str, LayerPlan]) -> None:
    """Gives the module the linears that are planned (attar.runtime.patches), in place. plans: by their names in it."""
    widths = {name: plan.in_features for name, plan in plans.items()}
    open_layers(module, widths, split_sizes(widths))


def check_rotations(plans: Iterable[LayerPlan], transforms: TransformSettings) -> None:
    """Raises AttarError for the first layer whose width has no rotation of the kind that these settings ask for."""
    for plan in plans:
        if not plan.transformed:
            continue
        try:
            check_rotation(plan.in_features, transforms.rotation)
        except AttarError as error:
            keep = f"{{{plan.role}: {{skip: true}}}}"
            fix = f"Keep such layers with --set 'quantize.roles={keep}'"
            raise AttarError(error.what, where=plan.name, fix=fix) from error


def fitting_group(in_features: int, group_size: int | None) -> tuple[int | None, str]:
    """(group size, what to add to a plan's reason): one scale per channel where the groups do not divide the width."""
    if group_size is None or in_features % group_size == 0:
        return group_size, ""
    return None, f"one scale a channel, as {group_size} does not divide the width"


def _plan(
    linear: NamedLinear, inside: bool, rules: Rules, chosen: Mapping[str, Any], pattern: str | None
) -> LayerPlan:
    """chosen: what overrides say of the layer, of which `pattern` is the last."""
    weights, acts, reason = rules.weights, rules.acts, None
    if not inside:
        weights, acts, reason = KEEP, None, "outside the transformer blocks"
    elif weights == KEEP:
        reason = "16 bits asked for"
    elif linear.role == "time_conditioning":
        weights, acts, reason = KEEP, None, "embedding of time"
    elif linear.role in ONE_TOKEN:
        what = ONE_TOKEN[linear.role]
        acts, reason = None, f"{what}: one token steers all others, so activations stay in floating point"
    if chosen:
        weights, acts = chosen.get("weights", weights), chosen.get("acts", acts)
        # An override of a skipped layer's activations alone must not quantize it, so `weights` decides.
        reason = "set for this layer" if pattern == linear.name else f"override {pattern!r}"
        if chosen.get("skip", False):
            weights = KEEP
        if not inside:  # no calibration data passes here
            acts = None
            reason += ", outside the transformer blocks" + ("" if weights == KEEP else ": weights only")
    if linear.kept is not None:
        weights, reason = KEEP, linear.kept
    kept = weights == KEEP
    act_bits, act_groups = (None, None) if kept or acts in (None, KEEP) else _by_groups(acts)
    module: Any = linear.module
    groups, note = None, ""
    one_token = not kept and act_bits is None and linear.role in {*ONE_TOKEN, "time_conditioning"}
    plain = (not kept and not inside) or (one_token and not rules.calibrate_modulation)
    if not kept and act_bits is None:
        groups, note = fitting_group(module.in_features, rules.group_size)
    return LayerPlan(
        name=linear.name,
        role=linear.role,
        weight_bits=None if kept else weights,
        act_bits=act_bits,
        reason=", ".join(filter(None, (reason, note))) or None,
        in_features=module.in_features,
        out_features=module.out_features,
        bias=module.bias is not None,
        group_size=groups,
        plain=plain,
        one_token=one_token,
        act_groups=act_groups,
    )


def _by_groups(acts: int | Sequence[int] | None) -> tuple[int | None, tuple[int, ...] | None]:
    """(the widest bits, those of each group of steps where they differ)."""
    if acts is None or isinstance(acts, int):
        return acts, None
    return max(acts), tuple(acts) if len(set(acts)) > 1 else None


def _check_acts(acts: Any, where: str | None, step_groups: int) -> None:
    if acts is None:
        return
    if not isinstance(acts, (list, tuple)):
        return _check_bits(acts, "acts", where, {"acts": 2})
    if len(acts) != step_groups:
        groups = f"{step_groups} groups of steps" if step_groups > 1 else "one group of steps"
        fix = f"Give one number, or as many as there are groups (quantize.step_groups), not {len(acts)}"
        raise AttarError(f"acts cannot be {list(acts)!r} for {groups}", where=where, fix=fix)
    for bits in acts:
        if type(bits) is not int or not 2 <= bits <= 8:
            fix = "Choose between 2 and 8; 16 is for all groups alike"
            raise AttarError(f"acts cannot be {bits!r} bits in a group of steps", where=where, fix=fix)


def _check_bits(bits: Any, what: str, where: str | None, least: Mapping[str, int]) -> None:
    fits = isinstance(bits, int) and not isinstance(bits, bool)
    if not fits or not (least[what] <= bits <= 8 or bits == KEEP):
        fix = f"Choose between {least[what]} and 8, or 16 for full precision"
        raise AttarError(f"{what} cannot be {bits!r} bits", where=where, fix=fix)


def _rotation_bytes(d: int, rotation: str) -> int:
    """Of an adaptive one as many as are expected: which one it is shows on data only."""
    if rotation == "kronecker":
        return 4 * sum(size**2 for size in kronecker_factors(d))
    if rotation == "orthogonal":
        return 4 * d * d
    if rotation == "hadamard":
        order = base_order(d) or 1
        return d + (order**2 if order > 1 else 0)
    if rotation == "adaptive":
        dual = 8 * d * block_width(d) + 4 * d
        return round(SALIENT_SHARE * dual + (1 - SALIENT_SHARE) * _rotation_bytes(d, "hadamard"))
    return 0


def weight_bytes(plan: LayerPlan) -> int:
    """Bytes of a planned layer's codes, scales and tables.

    Of rows with a bit more or less as many are expected as one step of their search has: which they are shows on data.
    """
    assert plan.weight_bits is not None
    if plan.row_bits is not None:
        return _mixed_bytes(plan, plan.row_bits)
    groups = group_count(plan.in_features, plan.group_size)
    row = packed_width(plan.in_features, plan.weight_bits) + 4 * groups
    tables = own_tables(plan.weight_format, plan.out_features, groups)
    return plan.out_features * row + tables * (2 << plan.weight_bits)


def _mixed_bytes(plan: LayerPlan, settings: RowBitsSettings) -> int:
    out, few = plan.out_features, int(plan.out_features * settings.step)
    total = out * (4 + 1)  # the scale and the kind of each row
    for grid, count in zip(
        settings.grids(plan.weight_bits or 0, plan.weight_format), (few, out - 2 * few, few), strict=True
    ):
        total += count * packed_width(plan.in_features, grid.bits)
        total += own_tables(grid.weight_format, count, 1) * (2 << grid.bits)
    return total


def forecast(plan: LayerPlan, transforms: TransformSettings) -> Forecast:
    """Bytes of the layer before (bfloat16) and after packing with these transforms.

    Raises AttarError when the groups do not divide the layer's input channels.
    """
    d, out = plan.in_features, plan.out_features
    bias = 2 * out if plan.bias else 0
    dense = 2 * d * out + bias
    if plan.weight_bits is None:
        return Forecast(dense, dense)
    packed = weight_bytes(plan) + bias
    if plan.plain:
        return Forecast(dense, packed)
    packed += 2 * plan.low_rank * (d + out)
    if transforms.shift and not (plan.act_bits is None and plan.bias):  # else the bias has all of it
        packed += 2 * d + 2 * out - bias
    if plan.transformed:
        packed += 4 * d if transforms.scale else 0
        packed += _rotation_bytes(d, transforms.rotation)
    packed += 8 if plan.act_bits is not None else 0
    return Forecast(dense, packed)
