"""Which numbers a recipe rounds to, and what stands beside them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from attar.budget.amount import Budget
from attar.errors import AttarError
from attar.quantize.low_rank import LowRankSettings
from attar.quantize.row_bits import RowBitsSettings
from attar.quantize.tables import check_weight_format, least_bits
from attar.quantize.weights import Grid
from attar.runtime.formats import INTEGER_FORMATS, check_format
from attar.stages.base import Stage


class LowRank(Stage):
    """A branch of low rank in high precision beside each quantized product."""

    rank: int = Field(default=32, ge=1)
    start: Literal["weight", "error", "zero"] = Field(
        default="weight",
        description="of the weight itself (SVDQuant), of what rounding loses (LoftQ), or zero, to be trained",
    )
    iterations: int = Field(default=1, ge=0, description="times that it is taken anew; the best is kept")
    metric: Literal["weight", "output"] = Field(
        default="weight", description="squared error of the weight, or of the output on calibration samples"
    )
    subtract: bool = Field(
        default=True, description="quantize the weight without the branch's part; Q-VDiT quantizes all of it"
    )
    gate: Literal["none", "calibrated", "trained"] = Field(
        default="none",
        description="one factor of the branch for each frame of a video: by its inputs (Q-VDiT's paper), or learned",
    )

    acts: int | None = Field(
        default=None,
        ge=2,
        le=8,
        description="only where activations are asked to have no more bits than this, and only beside layers whose "
        "inputs are rounded and whose narrower side is at least 8 times the rank; null for all layers",
    )

    def settings(self) -> LowRankSettings:
        """For the layers of a block. Raises AttarError for what cannot be."""
        return LowRankSettings(**self.model_dump(exclude={"acts"}), rounded_inputs=self.acts is not None)

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        before = {"gate": "none", "acts": None}
        return {key: value for key, value in handler(self).items() if before.get(key, ...) != value}


class RowBits(Stage):
    """One bit more for some rows of a weight and one less for as many others."""

    by: Literal["kurtosis", "error", "random"] = Field(
        default="kurtosis",
        description="heavy tails (MPQ-DM), or what a bit changes, row by row; random is a control",
    )
    metric: Literal["weight", "output"] = Field(
        default="output", description="squared error of the weight, or of the output on calibration samples"
    )
    step: float = Field(
        default=0.1, gt=0, le=0.5, description="share of the rows by which the search for how many goes on"
    )
    most: float = Field(default=0.5, gt=0, le=0.5, description="share of the rows that get more at most")
    salient_format: str = Field(
        default="int",
        description="weight format of rows with one bit more: int for that of the others, or residual",
    )

    @model_validator(mode="after")
    def _a_step_fits(self) -> RowBits:
        if self.most < self.step:
            raise ValueError("most is less than one step, so no bit would move")
        return self


class Quantize(Stage):
    """Bits by role, equivalent transforms, and which of their parameters exist."""

    weight_format: str = Field(default="int", description="of the weights' numbers, see docs/recipes.md")
    weights: int = Field(
        default=4,
        description="bits of block linears, 2 to 8 (1 in some formats); modulation linears get them weight-only",
    )
    step_groups: int = Field(
        default=1,
        ge=1,
        description="groups of equally many denoising steps, by which activations may have other bits",
    )
    clip_by_group: bool = Field(
        default=False,
        description="each of these groups has trained clipping factors of activations of its own",
    )
    acts: int | list[int] = Field(
        default=6,
        description="bits of their inputs, per token, 2 to 8; 16 keeps floating point; or a list by groups of steps",
    )
    act_format: Literal["int", "full_range", "fp8"] = Field(
        default="int",
        description="of the activations' numbers; full_range are integers that use the smallest code as well",
    )
    group_size: int | None = Field(
        default=None,
        ge=1,
        description="input channels to a scale in weight-only layers; null for one per channel",
    )
    low_rank: LowRank | None = Field(default=None, description="a branch beside the quantized product")
    row_bits: RowBits | None = Field(default=None, description="bits that differ by rows, at the same mean")
    split: bool = Field(
        default=False,
        description="layers behind a U-Net's skip connections get scales for each part of the concatenation",
    )
    roles: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="overrides by role or layer pattern: {weights, acts} or {skip: true}",
    )
    calibrate_modulation: bool = Field(
        default=False,
        description="round the weights of modulation, and of a U-Net's time projections, as those of other layers "
        "(shift, searched clipping, GPTQ), on the samples' steps; else to nearest",
    )
    shift: bool = Field(
        default=False, description="take the mean of each channel out of the inputs, and put it into the bias"
    )
    scale: bool = Field(default=True, description="channel scale c, started by SmoothQuant's rule")
    alpha: float = Field(default=0.5, ge=0, le=1, description="exponent of that rule")
    rotation: Literal["none", "hadamard", "kronecker", "orthogonal", "adaptive"] = "kronecker"
    rotation_threshold: float = Field(
        default=1.0,
        ge=0,
        description="of an adaptive one: root mean square of inputs that get the dual rotation",
    )
    affine: bool = Field(default=False, description="let a Kronecker rotation stretch as well")
    rotation_init: Literal["auto", "hadamard", "random_orthogonal", "identity"] = "auto"
    order: Literal["scale_then_rotate", "rotate_then_scale"] = "scale_then_rotate"
    weight_clip: bool = True
    act_clip: bool = True
    clip_start: float = Field(default=4.0, description="clipping factors start at the sigmoid of it: 0.982")
    clip_search: bool = Field(
        default=False, description="weight clipping starts where rounding to nearest errs least, row by row"
    )
    stats_ema: float | None = Field(
        default=None, ge=0, lt=1,
        description="momentum of the channels' maxima over the samples; null for their maximum",
    )  # fmt: skip

    @property
    def act_widths(self) -> list[int]:
        """The bits of activations in each group of steps, or the one number for all."""
        return self.acts if isinstance(self.acts, list) else [self.acts]

    @property
    def branch(self) -> LowRank | None:
        """The branch, where the bits of activations call for one."""
        most = None if self.low_rank is None else self.low_rank.acts
        return self.low_rank if most is None or max(self.act_widths) <= most else None

    @property
    def branch_rank(self) -> int | None:
        """Of the branch, None where there is none."""
        return None if self.branch is None else self.branch.rank

    @property
    def integer_acts(self) -> bool:
        """Whether activations are rounded to integers."""
        return self.acts != 16 and self.act_format in INTEGER_FORMATS

    @property
    def other_numbers(self) -> list[str]:
        """The formats of weights and activations that are not integers."""
        return sorted({self.weight_format, self.act_format} - {*INTEGER_FORMATS})

    @field_validator("weights")
    @classmethod
    def _possible_bits(cls, value: int, info: Any) -> int:
        least = least_bits(info.data.get("weight_format", "int"))
        if not least <= value <= 8:
            raise ValueError(f"choose between {least} and 8 bits")
        return value

    @field_validator("acts")
    @classmethod
    def _possible_acts(cls, value: int | list[int], info: Any) -> int | list[int]:
        if isinstance(value, int):
            if not (2 <= value <= 8 or value == 16):
                raise ValueError("choose between 2 and 8 bits, or 16")
            return value
        groups = info.data.get("step_groups", 1)
        if len(value) != groups:
            raise ValueError(
                f"give one number, or one for each group of steps; step_groups is {groups}, not {len(value)}"
            )
        if not all(2 <= bits <= 8 for bits in value):
            raise ValueError("choose between 2 and 8 bits in each group; 16 is for all groups alike")
        return value if len(set(value)) > 1 else value[0]

    @model_validator(mode="after")
    def _formats_have_these_bits(self) -> Quantize:
        try:
            check_weight_format(self.weight_format, self.weights)
            for bits in self.act_widths:
                if bits != 16:
                    check_format(self.act_format, bits)
        except AttarError as error:
            raise ValueError(f"{error.what}. {error.fix or ''}".strip()) from error
        return self

    def grids(self) -> list[Grid]:
        """Of all rows of a weight. Raises AttarError where rows cannot have them."""
        if self.row_bits is None:
            return [Grid(self.weights, self.weight_format)]
        return RowBitsSettings(**self.row_bits.model_dump()).grids(self.weights, self.weight_format)

    @property
    def integer_weights(self) -> bool:
        """Whether the codes of all weights are integers."""
        return all(grid.stored == "int" for grid in self.grids())

    @model_validator(mode="after")
    def _rows_have_these_bits(self) -> Quantize:
        if self.row_bits is None:
            return self
        if self.group_size is not None:
            raise ValueError("row_bits gives every row one scale: leave group_size out")
        try:
            self.grids()
        except AttarError as error:
            raise ValueError(f"row_bits: {error.what}. {error.fix or ''}".strip()) from error
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # who uses nothing of what came later has the digests, jobs and evidence of the time before
        later = {
            "split": self.split, "row_bits": self.row_bits, "clip_search": self.clip_search, "shift": self.shift,
            "step_groups": self.step_groups > 1, "calibrate_modulation": self.calibrate_modulation,
            "clip_by_group": self.clip_by_group,
        }  # fmt: skip
        return {key: value for key, value in handler(self).items() if later.get(key, True)}

    @property
    def clip_groups(self) -> int | None:
        """How many groups of steps have clipping factors of their own; None where all share a pair."""
        return self.step_groups if self.clip_by_group else None

    @model_validator(mode="after")
    def _groups_have_what_to_clip(self) -> Quantize:
        if self.clip_by_group and self.step_groups == 1:
            raise ValueError("clip_by_group needs groups of steps: set step_groups to 2 or more")
        if self.clip_by_group and not self.act_clip:
            raise ValueError("clip_by_group needs act_clip")
        if self.clip_by_group and self.acts == 16:
            raise ValueError("clip_by_group needs rounded activations: set acts to 8 or fewer")
        return self

    @model_validator(mode="after")
    def _stretch_needs_factors(self) -> Quantize:
        if self.affine and self.rotation != "kronecker":
            raise ValueError("affine needs the rotation kronecker")
        if self.clip_search and not self.weight_clip:
            raise ValueError("clip_search needs weight_clip")
        return self


class Allocate(Stage):
    """Bits of each layer under a budget, chosen by how much the layer's rounding changes what is computed."""

    budget: str = Field(
        description="share of the linears' size (0.30x), mean bits (3.2bits), loss (0.5dB), or same"
    )
    objective: Literal["block", "latents", "metrics", "output"] = Field(
        default="block",
        description="what counts: all blocks' outputs alike, what their errors come to in the final latents, or that "
        "between groups of layers and in each group what its own metric sees of it (ViDiT-Q); output is what they come "
        "to in a decoder's pictures",
    )
    acts: bool = Field(
        default=False,
        description="choose bits of activations too, as many on average over multiplications as quantize.acts says",
    )
    bits: list[int] = Field(
        default=[2, 3, 4, 5, 6, 8], min_length=1, description="widths that a layer may get, 2 to 8"
    )
    act_bits: list[int] | None = Field(
        default=None,
        min_length=1,
        description="widths that its activations may get, with acts; null for those of its weights",
    )
    samples: int = Field(default=8, ge=1, description="denoising steps that the layers are measured on")
    prompts: int = Field(default=2, ge=1, description="traced for it where the recipe itself needs no data")

    @field_validator("budget")
    @classmethod
    def _readable_budget(cls, value: str) -> str:
        try:
            Budget.parse(value)
        except AttarError as error:
            raise ValueError(f"{error.what}; {error.fix}") from error
        return value

    @property
    def act_widths(self) -> list[int]:
        """Of what activations may get."""
        return self.bits if self.act_bits is None else self.act_bits

    @field_validator("bits", "act_bits")
    @classmethod
    def _possible_widths(cls, value: list[int] | None) -> list[int] | None:
        if value is None:
            return None
        if not all(2 <= bits <= 8 for bits in value) or len(set(value)) != len(value):
            raise ValueError("name different widths from 2 to 8")
        return sorted(value)

    @model_validator(mode="after")
    def _metrics_keep_to_costs(self) -> Allocate:
        if self.objective == "metrics" and Budget.parse(self.budget).kind == "loss":
            raise ValueError(
                f"the budget {self.budget} is one of the latents' squared error, to which the objective metrics does "
                "not keep: name a size (0.30x), mean bits (3.2bits) or same, or set the objective to latents"
            )
        return self
