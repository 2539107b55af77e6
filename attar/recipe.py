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
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from attar.budget.amount import Budget
from attar.defaults import DEFAULT_RECIPE as DEFAULT_RECIPE
from attar.errors import AttarError
from attar.quantize.tables import check_trained_levels, has_bits
from attar.stages import (
    Allocate,
    Finetune,
    Paper,
    Quantize,
    Reconstruct,
    Rounding,
    Select,
    Stage,
    Synthesize,
    TextEncoder,
    Trace,
)

# settings that spare memory, and change no bit of the result
SPARING: Any = {"finetune": {"gradient_checkpointing": True}}


class Recipe(Stage):
    """How to compress a model. A stage set to null is left out."""

    name: str
    summary: str = ""
    paper: Paper | None = None
    notes: list[str] = Field(default_factory=list)
    trace: Trace | None = Trace()
    select: Select | None = Select()
    synthesize: Synthesize | None = None
    quantize: Quantize = Quantize()
    allocate: Allocate | None = None
    reconstruct: Reconstruct | None = Reconstruct()
    rounding: Rounding = Rounding()
    finetune: Finetune | None = None
    text_encoder: TextEncoder | None = None
    precision: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="of products and attention while blocks, or the whole model, are measured and learned; default: "
        "bfloat16 for a model in 16 bits on a GPU, else float32",
    )

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # who does not ask for it has the digests, jobs and evidence of the time before
        return {
            k: v for k, v in handler(self).items() if k not in ("precision", "synthesize") or v is not None
        }

    @model_validator(mode="after")
    def _synthesised_instead_of_traced(self) -> Recipe:
        if self.synthesize is None:
            if self.allocate is not None and self.allocate.objective == "output":
                raise ValueError(
                    "allocate.objective output is for autoencoders (synthesize): set it to latents or block"
                )
            return self
        if self.trace is not None or self.select is not None:
            raise ValueError("synthesize makes the calibration samples: set trace and select to null")
        if self.finetune is not None or self.quantize.step_groups > 1:
            raise ValueError(
                "synthesised samples are of no denoising step: set finetune to null, and quantize.step_groups to 1"
            )
        if self.reconstruct is not None and self.reconstruct.loss != "mse":
            raise ValueError(
                "an autoencoder has no tokens that attention weighs: set reconstruct.loss to mse"
            )
        if self.allocate is not None and self.allocate.objective not in ("block", "output"):
            raise ValueError("an autoencoder has no final latents: set allocate.objective to output or block")
        return self

    @model_validator(mode="after")
    def _levels_can_be_trained(self) -> Recipe:
        if self.trains_levels:
            try:
                check_trained_levels(self.quantize.weight_format)
            except AttarError as error:
                raise ValueError(f"{error.what}. {error.fix}") from error
        return self

    @model_validator(mode="after")
    def _learned_codes_are_integers(self) -> Recipe:
        if self.rounding.epochs and not self.quantize.integer_weights:
            raise ValueError(
                "rounding.epochs learns integers: set it to 0, quantize.weight_format to int or full_range, and have "
                "no rows of tables (row_bits)"
            )
        return self

    @model_validator(mode="after")
    def _trained_whole_or_by_blocks(self) -> Recipe:
        if self.finetune is None:
            return self
        whole = self.finetune
        if not self.polishes and whole.scale_lr:
            raise ValueError(
                "finetune.scale_lr is for codes that stay: it needs reconstruct, or rounding.method gptq, or "
                "rounding.epochs"
            )
        if self.polishes and (
            whole.weight_lr or whole.level_lr or whole.adapter_rank or whole.auxiliary_rank
        ):
            raise ValueError(
                "behind reconstruct, gptq or learned codes the codes stay, so finetune can train scales, biases and "
                "clipping alone: set its weight_lr, level_lr, adapter_rank and auxiliary_rank to 0, or reconstruct to "
                "null, rounding.method to nearest and rounding.epochs to 0"
            )
        if not self.polishes and self.select is not None:
            raise ValueError("finetune trains on every traced step: set select to null")
        return self

    @model_validator(mode="after")
    def _bits_are_chosen_once(self) -> Recipe:
        if self.allocate is not None and self.quantize.row_bits is not None:
            raise ValueError(
                "a budget chooses the bits of layers, row_bits those of rows: leave one of them out "
                "(allocate=null for a recipe that has a budget)"
            )
        return self

    @model_validator(mode="after")
    def _groups_of_steps_can_be_calibrated(self) -> Recipe:
        groups, chosen = self.quantize.step_groups, self.allocate
        if groups == 1:
            return self
        if self.finetune is not None and not self.quantize.clip_by_group:
            raise ValueError(
                "finetune trains all steps with the same bits: set quantize.step_groups to 1, or finetune to null, or "
                "quantize.clip_by_group to true for clipping by groups, for which batches hold steps of one group"
            )
        if self.quantize.clip_by_group and not self.trains_act_clip:
            raise ValueError(
                "quantize.clip_by_group needs something that trains clipping: finetune.clip_lr, or reconstruct with "
                "train_clip and epochs"
            )
        relation = None if self.finetune is None else self.finetune.relation
        if relation is not None and relation.window > 1:
            raise ValueError(
                "a window of steps may lie in two groups of them: set finetune.relation.window to 1, or "
                "quantize.step_groups"
            )
        if self.reconstruct is not None and self.reconstruct.batch_size > 1:
            raise ValueError(
                "a batch may hold steps of several groups, which have other bits: set reconstruct.batch_size to 1, or "
                "quantize.step_groups"
            )
        if chosen is not None and self.chooses_acts and chosen.samples < groups:
            raise ValueError(f"allocate.samples is less than one for each of {groups} groups of steps")
        return self

    @model_validator(mode="after")
    def _adapters_know_the_whole_weight(self) -> Recipe:
        whole, branch = self.finetune, self.quantize.branch
        if whole is not None and whole.adapter_start != "zero" and branch is not None:
            raise ValueError(
                "finetune.adapter_start takes the rounded weight, which a branch (low_rank) is no part of"
            )
        return self

    @model_validator(mode="after")
    def _branch_fits(self) -> Recipe:
        branch = self.quantize.low_rank
        if branch is not None:
            try:
                branch.settings()
            except AttarError as error:
                raise ValueError(f"{error.what}. {error.fix or ''}".strip()) from error
        branch = self.quantize.branch
        trained = self.reconstruct is not None and self.reconstruct.train_branch
        if branch is None and trained:
            raise ValueError("reconstruct.train_branch needs a branch, quantize.low_rank, at these bits")
        if branch is not None and branch.start == "zero" and not trained:
            raise ValueError("a branch that starts at zero needs reconstruct.train_branch")
        if branch is not None and branch.gate == "trained" and not trained:
            raise ValueError("a gate that is trained needs reconstruct.train_branch")
        if branch is not None and branch.gate != "none":
            if self.quantize.shift:
                raise ValueError("behind a shift a gate over frames would need a bias for each frame")
            if self.finetune is not None and not self.polishes:
                raise ValueError(
                    "a gate over frames is made block by block: set finetune to null, or gate to none"
                )
        if branch is not None and not branch.subtract and self.rounding.needs_data:
            # they make other errors than those that the branch has learned to undo
            raise ValueError(
                "a branch that is not subtracted needs rounding.method nearest and rounding.epochs 0"
            )
        return self

    @property
    def trains_levels(self) -> bool:
        """Whether what the numbers of a table depend on is trained, by blocks or with the whole model."""
        by_blocks, whole = self.reconstruct, self.finetune
        return (by_blocks is not None and by_blocks.train_levels) or (
            whole is not None and whole.level_lr > 0
        )

    @property
    def trains_act_clip(self) -> bool:
        """Whether the clipping factors of activations are trained, by blocks or with the whole model."""
        by_blocks, whole = self.reconstruct, self.finetune
        return (
            by_blocks is not None and by_blocks.train_clip and by_blocks.epochs > 0 and by_blocks.clip_lr > 0
        ) or (whole is not None and whole.clip_lr > 0)

    @property
    def polishes(self) -> bool:
        """Whether the whole model is trained behind a calibration block by block, with codes that stay."""
        learned = self.reconstruct is not None or self.rounding.needs_data
        return self.finetune is not None and learned

    @property
    def needs_data(self) -> bool:
        """Whether calibration samples are used at all."""
        learned = self.finetune is not None
        learned |= self.reconstruct is not None and self.reconstruct.epochs > 0
        branch = self.quantize.branch
        measured = branch is not None and (branch.metric == "output" or branch.gate != "none")
        measured |= self.quantize.rotation == "adaptive"
        rows = self.quantize.row_bits
        measured |= rows is not None and rows.metric == "output"
        return learned or measured or self.quantize.scale or self.quantize.shift or self.rounding.needs_data

    @property
    def traced(self) -> Trace | None:
        """What is traced: for learning, or for a budget or groups of steps alone; None where no data is needed."""
        if self.synthesize is not None:
            return None
        if self.needs_data:
            return self.trace
        if self.allocate is not None:
            return self._trace_of(self.allocate.prompts)
        # what timesteps there are shows in a trace
        return self._trace_of(1) if self.quantize.step_groups > 1 else None

    def _trace_of(self, prompts: int) -> Trace:
        """The recipe's trace, with so many prompts where it does not say how many itself."""
        trace = self.trace or Trace()
        said = "prompts" in trace.model_fields_set
        return trace if said else trace.model_copy(update={"prompts": prompts})

    @property
    def widths(self) -> list[int]:
        """The bits that a budget may choose: those listed that the weight format has. Empty without a budget."""
        listed = [] if self.allocate is None else self.allocate.bits
        return [bits for bits in listed if has_bits(self.quantize.weight_format, bits)]

    @property
    def chooses_acts(self) -> bool:
        """Whether the bits of activations are chosen too: not where these are no integers, groups of steps are given
        theirs, or the mean leaves no choice."""
        chosen, acts = self.allocate, self.quantize.acts
        if chosen is None or not chosen.acts or isinstance(acts, list) or not self.quantize.integer_acts:
            return False
        return min(chosen.act_widths) < acts < max(chosen.act_widths)

    @property
    def mean_acts(self) -> int:
        """The bits that activations have where nothing else is chosen, alike in all groups of steps."""
        assert isinstance(self.quantize.acts, int)  # where bits of activations are chosen
        return self.quantize.acts

    def refuse_autoencoder(self, what: str) -> None:
        """Raises AttarError where the recipe compresses an autoencoder. what: that is known of denoisers alone."""
        if self.synthesize is not None:
            raise AttarError(
                f"{what} is made for denoisers, and the recipe compresses an autoencoder",
                where=self.name,
                fix="Take another recipe; attar compress shows how far it is and what it saves",
            )

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
        acts = "/".join(map(str, self.quantize.act_widths))
        return f"W{self.quantize.weights}A{acts}" + "".join(
            f"-{kind}" for kind in self.quantize.other_numbers
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result, JSON-able: a job may go on with anything else changed."""
        return self.model_dump(mode="json", exclude=SPARING)

    def to_yaml(self) -> str:
        """Every key with its value, and as a comment what it means."""
        return "".join(_commented(self))


def _commented(stage: Stage, indent: str = "") -> Iterator[str]:
    for name, field in type(stage).model_fields.items():
        value = getattr(stage, name)
        if isinstance(value, Stage):
            yield f"{indent}{name}:\n"
            yield from _commented(value, indent + "  ")
            continue
        text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=10_000).rstrip()
        comment = f"  # {field.description}" if field.description and "\n" not in text else ""
        yield textwrap.indent(text, indent) + comment + "\n"


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
    if recipe.allocate is not None:
        if not recipe.widths:
            name = recipe.quantize.weight_format
            raise AttarError(
                f"the weight format {name} has none of the budget's bits",
                where="allocate.bits",
                fix="Leave the budget out with --set allocate=null",
            )
        most = Budget.parse(recipe.allocate.budget).at(recipe.quantize.weights)
        if most == Budget("bits", float(max(recipe.widths))) and not recipe.chooses_acts:
            # the widest for all: there is nothing to choose
            recipe = recipe.model_copy(update={"allocate": None})
    selects = recipe.finetune is None or recipe.polishes  # training alone uses every traced step
    traced = recipe.trace is not None and (recipe.select is not None or not selects)
    if recipe.needs_data and recipe.synthesize is None and not traced:
        raise AttarError("the recipe learns from data but has no trace or select stage", where=where)
    return recipe


def changed_settings(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value, value in the published recipe of that name). {} for a recipe of one's own.

    Bits, budget and the text encoder, which a user chooses apart from the recipe, and what describes a recipe are left
    out.
    """
    if recipe.name not in recipe_names():
        return {}
    used, published = (_flat(r) for r in (recipe, load_recipe(recipe.name)))
    keys = [key for key in {**published, **used} if used.get(key) != published.get(key)]
    return {key: (used.get(key), published.get(key)) for key in keys}


UNSAID = {
    *("name", "summary", "notes", "paper", "allocate", "text_encoder"),
    *("quantize.weights", "quantize.acts"),
}


def _flat(stage: Stage | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, with defaults that a dump leaves out."""
    content = (
        stage
        if isinstance(stage, Mapping)
        else {name: getattr(stage, name) for name in type(stage).model_fields}
    )
    found: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key not in UNSAID:
            found |= _flat(value, f"{key}.") if isinstance(value, (Stage, Mapping)) else {key: value}
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


def _readable(error: Exception, where: str) -> AttarError:
    if not isinstance(error, ValidationError):
        return AttarError(f"the recipe cannot be read: {error}", where=where)
    first = error.errors(include_url=False)[0]
    # of a setting that is one of several types, pydantic adds the type that was tried
    key = ".".join(str(part) for part in first["loc"] if part not in ("int", "list[int]"))
    if first["type"] == "extra_forbidden":
        return AttarError(f"unknown key {key!r}", where=where, fix="See attar recipes show NAME for all keys")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing" or isinstance(first["input"], (dict, Recipe)):
        return AttarError(f"{key or 'recipe'}: {message}", where=where)
    return AttarError(f"{key} = {first['input']!r}: {message}", where=where)
