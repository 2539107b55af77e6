"""A recipe: everything that decides how a model is compressed, as one checked and printable object.

    name: my-w4a4
    quantize: {weights: 4, acts: 4, rotation: hadamard}
    reconstruct: null

Unknown keys are refused. `load_recipe` takes the name of a published recipe or a path to a YAML file, and overrides
such as {"quantize.acts": 4}.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from attar.budget.amount import Budget
from attar.calibration.score import FEATURES
from attar.calibration.select import POLICIES
from attar.errors import AttarError
from attar.quantize.low_rank import LowRankSettings
from attar.quantize.tables import check_trained_levels, check_weight_format, least_bits
from attar.runtime.formats import check_format


class _Stage(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Trace(_Stage):
    """The candidate pool: full-precision generations whose every denoising step is a candidate."""

    prompts: int = Field(default=10, ge=1, description="how many calibration prompts are generated")
    steps: int | None = Field(default=None, ge=1, description="denoising steps; default: the model's own")
    guidance_scale: float | None = Field(default=None, ge=0, description="default: the model's own")


class Select(_Stage):
    """Which candidates become calibration samples."""

    policy: str = Field(default="salient", description="see docs/recipes.md")
    count: int = Field(default=40, ge=1, description="calibration samples M")
    features: str = Field(default="latent", description="what C_quant is computed on")
    norm: Literal["spectral", "frobenius"] = Field(default="spectral", description="of C_quant")
    neighbour: Literal["next", "previous"] = Field(
        default="next",
        description="C_diff's x_(t-1): the latents that a step gives, or those that the one before got",
    )
    normalise: Literal["min_max", "rank"] = Field(
        default="min_max", description="both scores before their product; rank is robust to one large value"
    )
    cap_per_prompt: int | None = Field(default=None, ge=1)
    cap_per_step: int | None = Field(default=None, ge=1)

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        return _one_of(value, POLICIES)

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: str) -> str:
        return _one_of(value, FEATURES)


class LowRank(_Stage):
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


class Quantize(_Stage):
    """Bits by role, equivalent transforms, and which of their parameters exist."""

    weight_format: str = Field(default="int", description="of the weights' numbers, see docs/recipes.md")
    weights: int = Field(
        default=4,
        description="bits of block linears, 2 to 8 (1 in some formats); modulation linears get them weight-only",
    )
    acts: int = Field(
        default=6, description="bits of their inputs, per token, 2 to 8; 16 keeps floating point"
    )
    act_format: Literal["int", "fp8"] = Field(default="int", description="of the activations' numbers")
    group_size: int | None = Field(
        default=None,
        ge=1,
        description="input channels to a scale in weight-only layers; null for one per channel",
    )
    low_rank: LowRank | None = Field(default=None, description="a branch beside the quantized product")
    roles: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="overrides by role or layer pattern: {weights, acts} or {skip: true}",
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
    stats_ema: float | None = Field(
        default=None, ge=0, lt=1,
        description="momentum of the channels' maxima over the samples; null for their maximum",
    )  # fmt: skip

    @field_validator("weights", "acts")
    @classmethod
    def _possible_bits(cls, value: int, info: Any) -> int:
        acts = info.field_name == "acts"
        least = 2 if acts else least_bits(info.data.get("weight_format", "int"))
        if not (least <= value <= 8 or (value == 16 and acts)):
            raise ValueError(f"choose between {least} and 8 bits" + (", or 16" if acts else ""))
        return value

    @model_validator(mode="after")
    def _formats_have_these_bits(self) -> Quantize:
        try:
            check_weight_format(self.weight_format, self.weights)
            if self.acts != 16:
                check_format(self.act_format, self.acts)
        except AttarError as error:
            raise ValueError(f"{error.what}. {error.fix or ''}".strip()) from error
        return self

    @model_validator(mode="after")
    def _stretch_needs_factors(self) -> Quantize:
        if self.affine and self.rotation != "kronecker":
            raise ValueError("affine needs the rotation kronecker")
        return self


class Allocate(_Stage):
    """Bits of each layer under a budget, chosen by how much the layer's rounding changes its block's output."""

    budget: str = Field(
        description="share of the linears' size (0.30x), mean bits (3.2bits), loss (0.5dB), or same"
    )
    bits: list[int] = Field(
        default=[2, 3, 4, 5, 6, 8], min_length=1, description="widths that a layer's weights may get, 2 to 8"
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

    @field_validator("bits")
    @classmethod
    def _possible_widths(cls, value: list[int]) -> list[int]:
        if not all(2 <= bits <= 8 for bits in value) or len(set(value)) != len(value):
            raise ValueError("name different widths from 2 to 8")
        return sorted(value)


class Reconstruct(_Stage):
    """Block-by-block training of scales, rotations and clipping."""

    epochs: int = Field(default=15, ge=0)
    batch_size: int = Field(
        default=1, ge=1, description="calibration samples in a step; one sample holds both CFG branches"
    )
    transform_lr: float = Field(default=5e-3, gt=0)
    clip_lr: float = Field(default=5e-2, gt=0)
    branch_lr: float = Field(default=2.5e-4, gt=0)
    eta_min_ratio: float = Field(default=1e-3, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    normalise_loss: bool = Field(default=False, description="divide each loss by its own value")
    train_scale: bool = True
    train_rotation: bool = True
    train_clip: bool = True
    train_levels: bool = Field(default=False, description="also what a table format's numbers depend on")
    level_lr: float = Field(default=1e-3, gt=0)
    train_branch: bool = Field(default=False, description="needs quantize.low_rank")
    loss: Literal["token_weighted", "mse"] = "token_weighted"
    temporal_weight: float = Field(
        default=0.0,
        ge=0,
        description="γ of the divergence of frame similarities that is added to it (Q-VDiT)",
    )
    lambda_min: float = Field(
        default=0.5, gt=0, description="weight of the token that receives least attention"
    )
    lambda_max: float = Field(default=1.0, gt=0)
    lambda_over: Literal["joint", "stream"] = Field(
        default="joint",
        description="tokens among which λ is normalised: text and video together, or each alone",
    )
    cap_quantile: float | None = Field(
        default=None, gt=0, le=1, description="cut the attention mass there, against attention sinks"
    )
    propagate: Literal["fp", "quant"] = Field(
        default="fp", description="what the next block is calibrated on"
    )

    @model_validator(mode="after")
    def _ordered_weights(self) -> Reconstruct:
        if self.lambda_min > self.lambda_max:
            raise ValueError("lambda_min is larger than lambda_max")
        return self


class Rounding(_Stage):
    """How transformed weights become integers."""

    method: Literal["nearest", "gptq"] = "gptq"
    damping: float = Field(default=0.01, gt=0)
    block: int = Field(default=128, ge=1)


class TextEncoder(_Stage):
    """Low-bit weights of the linears in the text encoders' layers; activations stay in floating point."""

    weights: int = Field(default=8, ge=2, le=8, description="bits")
    group_size: int | None = Field(
        default=64, ge=1, description="input channels to a scale; null for one scale per output channel"
    )


class Paper(_Stage):
    title: str
    url: str


class Recipe(_Stage):
    """How to compress a model. A stage set to null is left out."""

    name: str
    summary: str = ""
    paper: Paper | None = None
    notes: list[str] = Field(default_factory=list)
    trace: Trace | None = Trace()
    select: Select | None = Select()
    quantize: Quantize = Quantize()
    allocate: Allocate | None = None
    reconstruct: Reconstruct | None = Reconstruct()
    rounding: Rounding = Rounding()
    text_encoder: TextEncoder | None = None

    @model_validator(mode="after")
    def _levels_can_be_trained(self) -> Recipe:
        if self.reconstruct is not None and self.reconstruct.train_levels:
            try:
                check_trained_levels(self.quantize.weight_format)
            except AttarError as error:
                raise ValueError(f"{error.what}. {error.fix}") from error
        return self

    @model_validator(mode="after")
    def _branch_fits(self) -> Recipe:
        branch = self.quantize.low_rank
        if branch is not None:
            try:
                LowRankSettings(**branch.model_dump())
            except AttarError as error:
                raise ValueError(f"{error.what}. {error.fix or ''}".strip()) from error
        trained = self.reconstruct is not None and self.reconstruct.train_branch
        if branch is None and trained:
            raise ValueError("reconstruct.train_branch needs a branch, quantize.low_rank")
        if branch is not None and branch.start == "zero" and not trained:
            raise ValueError("a branch that starts at zero needs reconstruct.train_branch")
        if branch is not None and not branch.subtract and self.rounding.method == "gptq":
            # GPTQ makes other errors than those that the branch has learned to undo
            raise ValueError("a branch that is not subtracted needs rounding.method nearest")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether calibration samples are used at all."""
        learned = self.reconstruct is not None and self.reconstruct.epochs > 0
        branch = self.quantize.low_rank
        measured = branch is not None and branch.metric == "output"
        measured |= self.quantize.rotation == "adaptive"
        return learned or measured or self.quantize.scale or self.rounding.method == "gptq"

    @property
    def traced(self) -> Trace | None:
        """What is traced: for learning, or for a budget alone; None where no data is needed."""
        if self.needs_data or self.allocate is None:
            return self.trace if self.needs_data else None
        return self.trace or Trace(prompts=self.allocate.prompts)

    def refuse_budget(self) -> None:
        """Raises AttarError where the bits are yet to be chosen under a budget."""
        if self.allocate is not None:
            raise AttarError(
                "the bits are chosen under a budget, which needs data",
                where="allocate.budget",
                fix="Write the plan with attar allocate first, then give it to attar compress as --plan",
            )

    @property
    def bits(self) -> str:
        kinds = {self.quantize.weight_format, self.quantize.act_format} - {"int"}
        return f"W{self.quantize.weights}A{self.quantize.acts}" + "".join(
            f"-{kind}" for kind in sorted(kinds)
        )

    def to_yaml(self) -> str:
        """Every key with its value, and as a comment what it means."""
        return "".join(_commented(self))


def _commented(stage: _Stage, indent: str = "") -> Iterator[str]:
    for name, field in type(stage).model_fields.items():
        value = getattr(stage, name)
        if isinstance(value, _Stage):
            yield f"{indent}{name}:\n"
            yield from _commented(value, indent + "  ")
            continue
        text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=10_000).rstrip()
        comment = f"  # {field.description}" if field.description and "\n" not in text else ""
        yield textwrap.indent(text, indent) + comment + "\n"


DEFAULT_RECIPE = "attar-ptq"


def recipe_names() -> list[str]:
    """Names of the recipes that come with attar."""
    folder = resources.files("attar") / "recipes"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """A recipe by name, YAML path, mapping or object, with dotted overrides such as {"quantize.acts": 4}.

    Raises AttarError for an unknown name, an unreadable file, an unknown key, or a value out of range.
    """
    if isinstance(source, Recipe):
        content, where = source.model_dump(), source.name
    elif isinstance(source, Mapping):
        content, where = dict(source), "recipe"
    else:
        content, where = _read(str(source))
    for key, value in (overrides or {}).items():
        _set(content, key, value)
    try:
        recipe = Recipe(**content)
    except (ValidationError, TypeError) as error:
        raise _readable(error, where) from error
    if recipe.needs_data and (recipe.trace is None or recipe.select is None):
        raise AttarError("the recipe learns from data but has no trace or select stage", where=where)
    return recipe


def changed_settings(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value, value in the published recipe of that name). {} for a recipe of one's own.

    Bits, budget and the text encoder, which a user chooses apart from the recipe, and what describes a recipe are left
    out.
    """
    if recipe.name not in recipe_names():
        return {}
    unsaid: Any = {
        "quantize": {"weights", "acts"},
        **dict.fromkeys(("name", "summary", "notes", "paper", "allocate", "text_encoder"), True),
    }
    used, published = (_flat(r.model_dump(exclude=unsaid)) for r in (recipe, load_recipe(recipe.name)))
    keys = [key for key in {**published, **used} if used.get(key) != published.get(key)]
    return {key: (used.get(key), published.get(key)) for key in keys}


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _read(name: str) -> tuple[dict[str, Any], str]:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise AttarError("no such recipe file", where=name, fix="Give a published name or a YAML file")
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        if name not in recipe_names():
            raise AttarError(
                f"unknown recipe {name!r}", fix=f"Use one of {', '.join(recipe_names())}, or a YAML file"
            )
        text = (resources.files("attar") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise AttarError(f"the recipe is not valid YAML ({first})", where=name) from error
    if not isinstance(content, dict):
        raise AttarError("the recipe is not a mapping of stages", where=name)
    return content, name


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = content.get(parent)
        if child is None:  # a stage that is left out, or only implied, comes to be with its defaults
            child = {}
        if not isinstance(child, dict):
            raise AttarError(f"{key!r} does not name a setting", fix="See attar recipes show NAME")
        content[parent] = dict(child)
        content = content[parent]
    content[last] = value


def _one_of(value: str, known: Any) -> str:
    if value not in known:
        raise ValueError(f"unknown value {value!r}; use one of {', '.join(known)}")
    return value


def _readable(error: Exception, where: str) -> AttarError:
    if not isinstance(error, ValidationError):
        return AttarError(f"the recipe cannot be read: {error}", where=where)
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return AttarError(f"unknown key {key!r}", where=where, fix="See attar recipes show NAME for all keys")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing" or isinstance(first["input"], (dict, Recipe)):
        return AttarError(f"{key or 'recipe'}: {message}", where=where)
    return AttarError(f"{key} = {first['input']!r}: {message}", where=where)
