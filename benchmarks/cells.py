"""What the quality benchmark measures: methods as recipes with overrides, grouped into studies.

A cell is one (method, bits, seed). A study lists its methods once; the runner fills the cells one at a time. Studies
share cells: what two of them call by different names is measured once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

from attar.recipe import SPARING, Recipe, load_recipe


@dataclass(frozen=True)
class Method:
    """A row of a table: a recipe with overrides. least, most: the bits of weights at which it exists."""

    name: str
    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)
    least: int = 1
    most: int = 8

    def resolve(self, bits: tuple[int, int]) -> Recipe:
        """The recipe at (weights, acts) bits."""
        return _resolved(self.recipe, json.dumps(self.overrides, sort_keys=True), *bits)


@functools.cache
def _resolved(recipe: str, overrides: str, weights: int, acts: int) -> Recipe:
    """The recipe; kept, since tables look the same ones up again and again. overrides: JSON."""
    widths = {"quantize.weights": weights, "quantize.acts": acts}
    return load_recipe(recipe, {**json.loads(overrides), **widths})


@dataclass(frozen=True)
class Study:
    """A table: its methods at some bit widths.

    prompts: held-out videos of a cell, 0 for block errors alone. outliers: on the model with planted outlier channels.
    needs: a figure that its cells must have, and cells of older benchmarks may lack.
    """

    name: str
    question: str
    bits: tuple[tuple[int, int], ...]
    methods: tuple[Method, ...]
    prompts: int = 24
    outliers: bool = False
    needs: str = "block_errors"

    def at(self, bits: tuple[int, int]) -> list[Method]:
        """The methods that exist at these bits; of those that do the same there the first."""
        found: dict[str, Method] = {}
        for method in self.methods:
            if method.least <= bits[0] <= method.most:
                found.setdefault(digest(method.resolve(bits)), method)
        return list(found.values())


# Settings that are younger than the first cells: at these values a recipe does what it did before it had them.
LATER = {
    "select": {"neighbour": "next", "normalise": "min_max"},
    "quantize": {"clip_start": 4.0, "weight_format": "int", "act_format": "int", "rotation_threshold": 1.0},
    "quantize.low_rank": {"subtract": True},
    "allocate": {"objective": "block", "acts": False},
    "reconstruct": {
        **{"lambda_over": "joint", "train_levels": False, "level_lr": 1e-3},
        **{"temporal_weight": 0.0, "train_branch": False, "branch_lr": 2.5e-4},
    },
}


def digest(recipe: Recipe, *without: str) -> str:
    """A short name of what a recipe does, whatever it is called. without: stages that do not count."""
    unsaid: Any = {**SPARING, **dict.fromkeys(("name", "summary", "notes", "paper", *without), True)}
    content = recipe.model_dump(exclude=unsaid, exclude_none=True)
    if recipe.quantize.branch is None:
        content["quantize"].pop("low_rank", None)  # these bits do not call for it
    for path, former in LATER.items():
        *parents, stage = path.split(".")
        inside = content
        for parent in parents:
            inside = inside.get(parent, {})
        if stage in inside:
            inside[stage] = {k: v for k, v in inside[stage].items() if k not in former or v != former[k]}
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _names() -> dict[str, list[tuple[str, str, tuple[int, int]]]]:
    """Every (study, method, bits) by what it does, and to which model."""
    found: dict[str, list[tuple[str, str, tuple[int, int]]]] = {}
    for study in STUDIES.values():
        for bits in study.bits:
            for method in study.at(bits):
                place = (study.name, method.name, bits)
                found.setdefault(f"{digest(method.resolve(bits))}-{study.outliers}", []).append(place)
    return found


def key(study: str, method: str, bits: tuple[int, int], seed: int) -> str:
    return f"{study}|{method}|W{bits[0]}A{bits[1]}|{seed}"


def seeds_of(cells: dict[str, Any]) -> list[int]:
    """The seeds that anything was measured with."""
    return sorted({int(name.rsplit("|", 1)[1]) for name in cells})


def block_error(cell: dict[str, Any]) -> float:
    """Held-out block error, mean over blocks."""
    return sum(cell["block_errors"]) / len(cell["block_errors"])


def find_cell(
    cells: dict[str, Any], study: Study, method: Method, bits: tuple[int, int], seed: int
) -> dict[str, Any] | None:
    """The cell, if this study or another one measured it with as many prompts; of several one with all its figures."""
    does, found = digest(method.resolve(bits)), None
    for place in _names()[f"{does}-{study.outliers}"]:
        cell = cells.get(key(*place, seed))
        if (
            cell is None or cell["recipe"] != does or study.needs not in cell
        ):  # the recipe was another one then
            continue
        if not study.prompts or cell.get("prompts") == study.prompts:
            if complete(study, cell):
                return cell
            found = found or cell
    return found


def complete(study: Study, cell: dict[str, Any]) -> bool:
    """Whether the cell has what the study shows; cells that are older than the Fréchet distance lack it."""
    return not study.prompts or "frechet" in cell


NEAREST = {"rounding.method": "nearest"}
FULL = {"select.policy": "salient", "reconstruct.loss": "token_weighted"}
BASE = {"select.policy": "random", "reconstruct.loss": "mse", **NEAREST}


def _base(**changes: Any) -> dict[str, Any]:
    return {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}


MAIN = Study(
    "main",
    "Which method keeps the model's videos, at which bits?",
    ((8, 8), (4, 8), (4, 6), (4, 4), (3, 6)),
    (
        Method("round to nearest", "rtn"),
        Method("SmoothQuant", "smoothquant"),
        Method("Hadamard (QuaRot-style)", "hadamard"),
        Method("learned base", "s2q-vdit", BASE),
        Method("base + SDS", "s2q-vdit", _base(select__policy="salient")),
        Method("base + STD", "s2q-vdit", _base(reconstruct__loss="token_weighted")),
        Method("S²Q-VDiT without GPTQ", "s2q-vdit", {**FULL, **NEAREST}),
        Method("S²Q-VDiT (with GPTQ)", "s2q-vdit"),
        Method("learned base + GPTQ", "s2q-vdit", _base(rounding__method="gptq")),
        Method("attar-ptq", "attar-ptq"),
        Method("attar (default)", "attar"),
    ),
)

FEW_EPOCHS = {"reconstruct.epochs": 5}
FIXED = {"quantize.rotation": "hadamard"}
CLIP_ALONE = {"reconstruct.train_scale": False, "reconstruct.train_rotation": False}
LADDER = Study(
    "ladder",
    "Does every part of `attar-ptq` lower the held-out block error? (5 epochs)",
    ((4, 4),),
    (
        Method("round to nearest", "rtn"),
        Method("rotation", "hadamard"),
        Method("scaling", "smoothquant"),
        Method("scaling + rotation", "smoothquant", FIXED),
        Method("+ learned clipping", "learned-base", {**FEW_EPOCHS, **CLIP_ALONE}),
        Method("+ learned rotation", "learned-base", {**FEW_EPOCHS, "reconstruct.train_scale": False}),
        Method("+ learned scale", "learned-base", FEW_EPOCHS),
        Method("+ GPTQ", "learned-base", {**FEW_EPOCHS, "rounding.method": "gptq"}),
    ),
    prompts=0,
)

OUTLIERS = replace(
    LADDER,
    name="outliers",
    question="The ladder where some channels are 20 times larger, as in large transformers?",
    outliers=True,
)

WEIGHT_ONLY = Study(
    "weight-only",
    "What do rotations, learning and GPTQ give where activations stay in floating point?",
    ((4, 16), (3, 16)),
    (
        Method("round to nearest", "rtn"),
        Method("SmoothQuant", "smoothquant"),
        Method("Hadamard (QuaRot-style)", "hadamard"),
        Method("attar-ptq", "attar-ptq"),
        Method("round to nearest, groups of 64", "rtn", {"quantize.group_size": 64}),
        Method("attar-ptq, groups of 64", "attar-ptq", {"quantize.group_size": 64}),
    ),
    prompts=0,
)

CLIPPING = Study(
    "clipping",
    "Does learned clipping help on top of a fixed rotation, and where? (5 epochs)",
    ((4, 4), (8, 8)),
    (
        Method("rotation", "hadamard"),
        Method(
            "rotation + learned clipping", "learned-base", {**FEW_EPOCHS, **FIXED, "quantize.scale": False}
        ),
    ),
    prompts=0,
)

POLICIES = (
    "salient", "salient_stratified", "last_steps", "random", "uniform_steps", "one_prompt_all_steps",
    "few_prompts_all_steps", "few_prompts_random_steps", "change", "amplification", "lowest",
)  # fmt: skip
SELECTION = Study(
    "selection",
    "Does it matter which samples are chosen? (plain error, nearest rounding, 5 epochs)",
    ((4, 4),),
    tuple(Method(policy, "s2q-vdit", {**_base(select__policy=policy), **FEW_EPOCHS}) for policy in POLICIES),
)


def _weighted(low: float) -> Method:
    return Method(
        f"λ_min = {low:g}",
        "s2q-vdit",
        _base(reconstruct__loss="token_weighted", reconstruct__lambda_min=low, reconstruct__epochs=5),
    )


DISTILLATION = Study(
    "distillation",
    "What does weighting tokens by attention do? (random samples, nearest rounding, 5 epochs)",
    ((4, 4),),
    (Method("plain error", "s2q-vdit", {**BASE, **FEW_EPOCHS}), *map(_weighted, (0.1, 0.25, 0.5, 0.75))),
    prompts=0,
    needs="most_attended",
)

LEARNING = Study(
    "learning",
    "Over-fitting, samples, propagation, and the kind of rotation (`attar-ptq`, here *default*, one thing changed)",
    ((4, 4),),
    tuple(
        Method(name, "attar-ptq", changes)
        for name, changes in (
            ("default: 5 epochs, 40 samples, fp", {}),
            ("1 epoch", {"reconstruct.epochs": 1}),
            ("15 epochs", {"reconstruct.epochs": 15}),
            ("15 epochs, 10 samples", {"reconstruct.epochs": 15, "select.count": 10}),
            ("10 samples", {"select.count": 10}),
            ("80 samples", {"select.count": 80}),
            ("batches of 4", {"reconstruct.batch_size": 4}),
            ("propagate quant", {"reconstruct.propagate": "quant"}),
            ("affine Kronecker", {"quantize.affine": True}),
            ("fixed Hadamard", {"quantize.rotation": "hadamard"}),
            ("rotate, then scale", {"quantize.order": "rotate_then_scale"}),
        )
    ),
    prompts=0,
)

LRQ_DIT = Study(
    "lrq-dit",
    "LRQ-DiT: do logarithmic weights and rotations by layer lower the held-out block error?",
    ((4, 6), (4, 4), (3, 6)),
    (
        Method("round to nearest", "rtn"),
        Method("Hadamard (QuaRot-style)", "hadamard"),
        Method("scaling + rotation", "smoothquant", FIXED),
        Method("+ adaptive rotation", "lrq-dit", {"quantize.weight_format": "int"}),
        Method("+ twin-log weights", "lrq-dit", FIXED),
        Method("LRQ-DiT (both)", "lrq-dit"),
        Method("LRQ-DiT + GPTQ", "lrq-dit", {"rounding.method": "gptq"}),
        Method("attar-ptq", "attar-ptq"),
    ),
    prompts=0,
)

ACCURACY = Study(
    "accuracy",
    "Do the compressed models still show what every held-out prompt says?",
    ((4, 6),),
    (
        Method("S²Q-VDiT (with GPTQ)", "s2q-vdit"),
        Method("attar-ptq", "attar-ptq"),
        Method("attar (default)", "attar"),
    ),
    prompts=200,
)


def _formats(weights: int, formats: tuple[str, ...], learned: tuple[str, ...], trained: str) -> Study:
    """Tables of so many bits beside integers, rounded to nearest, then on top of attar-ptq."""

    def numbers(name: str, **more: Any) -> dict[str, Any]:
        return {"quantize.weight_format": name, **more}

    integers = ("int",) if weights > 1 else ()
    return Study(
        f"formats-{weights}",
        f"Which numbers should {weights} bit{'s' if weights > 1 else ''} of a weight stand for?",
        ((weights, 6),),
        (
            *(Method(f"{name}, round to nearest", "rtn", numbers(name)) for name in (*integers, *formats)),
            *(Method(f"{name}, attar-ptq", "attar-ptq", numbers(name)) for name in (*integers, *learned)),
            Method(
                f"{trained}, attar-ptq, levels trained", "attar-ptq",
                numbers(trained, **{"reconstruct.train_levels": True}),
            ),
        ),
        prompts=0,
    )  # fmt: skip


FORMATS = (
    _formats(1, ("binary", "lloyd"), ("binary",), "binary"),
    _formats(2, ("dual_binary_plain", "dual_binary", "lloyd"), ("dual_binary", "lloyd"), "dual_binary"),
    _formats(3, ("power", "residual", "lloyd"), ("residual", "lloyd"), "residual"),
    _formats(4, ("nf4", "power", "residual", "lloyd"), ("power", "lloyd"), "power"),
)

# The rate of a branch times the number of steps stays that of q-vdit.
BRANCH = {"reconstruct.train_branch": True, "reconstruct.branch_lr": 7.5e-4}
QVDIT = {**FEW_EPOCHS, "reconstruct.branch_lr": 7.5e-4}
NO_TQE = {"quantize.low_rank": None, "reconstruct.train_branch": False}
NO_TMD = {"reconstruct.temporal_weight": 0}
TMD = {"reconstruct.temporal_weight": 100}
TQE = {**BRANCH, "quantize.low_rank": {"rank": 1, "start": "zero", "subtract": False}}
SYSTEMS = Study(
    "systems",
    "What do the parts of Q-VDiT and ViDiT-Q give, alone and on top of learned transforms? (5 epochs)",
    ((4, 6), (3, 6)),
    (
        Method("Q-VDiT without TMD and TQE", "q-vdit", {**FEW_EPOCHS, **NO_TQE, **NO_TMD}),
        Method("Q-VDiT without TMD", "q-vdit", {**QVDIT, **NO_TMD}),
        Method("Q-VDiT without TQE", "q-vdit", {**FEW_EPOCHS, **NO_TQE}),
        Method("Q-VDiT", "q-vdit", QVDIT),
        Method("Q-VDiT, gate by its inputs", "q-vdit", {**QVDIT, "quantize.low_rank.gate": "calibrated"}),
        Method("Q-VDiT, trained gate", "q-vdit", {**QVDIT, "quantize.low_rank.gate": "trained"}),
        Method("Q-VDiT, γ = 10,000", "q-vdit", {**QVDIT, "reconstruct.temporal_weight": 10_000}),
        Method("ViDiT-Q", "vidit-q"),
        Method("ViDiT-Q without rotation", "vidit-q", {"quantize.rotation": "none"}),
        Method("ViDiT-Q without scale", "vidit-q", {"quantize.scale": False}),
        Method("learned base", "learned-base", FEW_EPOCHS),
        Method("learned base + TMD", "learned-base", {**FEW_EPOCHS, **TMD}),
        Method("learned base + TQE", "learned-base", {**FEW_EPOCHS, **TQE}),
        Method("attar-ptq", "attar-ptq"),
        Method("attar-ptq + TMD", "attar-ptq", TMD),
        Method("attar-ptq + a trained branch", "attar-ptq", {**BRANCH, "quantize.low_rank.rank": 1}),
    ),
    prompts=0,
    needs="temporal",
)

SVDQUANT = Study(
    "svdquant",
    "What do the branch and the channel scales of SVDQuant give?",
    ((4, 6), (4, 4), (3, 6)),
    (
        Method("SVDQuant without branch", "svdquant", {"quantize.low_rank": None}),
        Method("SVDQuant without scale", "svdquant", {"quantize.scale": False}),
        Method("SVDQuant", "svdquant"),
    ),
    prompts=0,
)

NO_BRANCH = {"quantize.low_rank": None}  # which attar has at four bits of activations
UNIFORM = {"allocate": None, **NO_BRANCH}
ACTS_ALIKE = {"allocate.acts": False, "allocate.act_bits": None, **NO_BRANCH}
WITH_NEAREST = {"reconstruct.round_weights": True}
OWN = Study(
    "own",
    "What do the parts of the recipe attar give, taken away one at a time? (the same bits where a row does not say; "
    "branches in the row attar alone)",
    ((4, 4), (3, 6)),
    (
        Method("attar-ptq", "attar-ptq"),
        Method("attar, same bits", "attar", UNIFORM),
        Method("without shifts", "attar", {**UNIFORM, "quantize.shift": False}),
        Method("activations without the last code", "attar", {**UNIFORM, "quantize.act_format": "int"}),
        Method("weights with the last code", "attar", {**UNIFORM, "quantize.weight_format": "full_range"}),
        Method("without learning", "attar", {**UNIFORM, "reconstruct.epochs": 0}),
        Method("without clip search", "attar", {**UNIFORM, "quantize.clip_search": False}),
        Method("GPTQ of the clipped weight", "attar", {**UNIFORM, "rounding.target": "clipped"}),
        Method("columns in their own order", "attar", {**UNIFORM, "rounding.order": "given"}),
        Method("weights rounded while learning", "attar", {**UNIFORM, **WITH_NEAREST}),
        Method("nearest rounding", "attar", {**UNIFORM, "rounding.method": "nearest"}),
        Method("codes learned behind GPTQ", "attar", {**UNIFORM, "rounding.epochs": 5}),
        Method("attar, activations alike", "attar", ACTS_ALIKE),
        Method("attar, activations and blocks alike", "attar", {**ACTS_ALIKE, "allocate.objective": "block"}),
        Method("attar", "attar"),
        Method("attar, without branches", "attar", NO_BRANCH),
        Method("activations down to two bits", "attar", {"allocate.act_bits": None, **NO_BRANCH}),
    ),
    prompts=0,
)

ROWS = Study(
    "rows",
    "Are bits that differ by rows worth it, at the same mean? (MPQ-DM's outlier-driven mixed quantization)",
    ((4, 6), (3, 6)),
    tuple(
        Method(f"{recipe}{', ' if rule else ''}{rule}", recipe, overrides)
        for recipe in ("rtn", "attar-ptq")
        for rule, overrides in {
            "": {},
            "rows by kurtosis": {"quantize.row_bits": {"by": "kurtosis", "metric": "weight"}},
            "rows by kurtosis, residual": {
                "quantize.row_bits": {"by": "kurtosis", "metric": "weight", "salient_format": "residual"}
            },
            "rows at random": {"quantize.row_bits": {"by": "random", "metric": "weight"}},
            "rows by error of the weight": {"quantize.row_bits": {"by": "error", "metric": "weight"}},
            "rows by error of the output": {
                "quantize.row_bits": {"by": "error"},
                **({} if recipe != "rtn" else {"trace": {"prompts": 10}, "select": {"policy": "random"}}),
            },
        }.items()
    ),
    prompts=0,
)

POLISH = {
    **{"finetune.steps": 300, "finetune.scale_lr": 3e-3},
    **{"finetune.bias_lr": 5e-4, "finetune.clip_lr": 3e-3},
}

TRAINING = Study(
    "training",
    "What does training the whole model give, and what its parts? (1,000 steps)",
    ((4, 4), (3, 3)),
    (
        Method("round to nearest", "rtn"),
        Method("attar-ptq", "attar-ptq"),
        Method("attar-ptq, polished", "attar-ptq", POLISH),
        Method("attar-mixed", "attar-mixed"),
        Method("attar-mixed, polished", "attar-mixed", POLISH),
        Method("clipping alone", "quantized-distillation", {"finetune.weight_lr": 0}),
        Method("quantized distillation (all weights)", "quantized-distillation"),
        Method("QVGen", "qvgen"),
        Method("QVGen, branches removed at once", "qvgen", {"finetune.auxiliary_keep": 0}),
        Method("EfficientDM", "efficientdm"),
    ),
)

PRECISION = Study(
    "precision",
    "Does it matter that blocks are measured and learned with products and attention in bfloat16?",
    ((4, 6), (4, 4), (8, 8)),
    tuple(
        Method(f"{recipe}{note}", recipe, {**overrides, **NO_BRANCH})
        for recipe in ("attar-ptq", "attar")
        for note, overrides in {"": {}, ", bfloat16": {"precision": "bfloat16"}}.items()
    ),
)

MIXED = Study(
    "mixed",
    "Which error should decide the bits of ViDiT-Q's layers, of weights and activations?",
    ((4, 6), (3, 6)),
    (
        *(
            Method(
                f"ViDiT-Q, bits by {name}", "vidit-q",
                {"allocate": {"budget": "same", "objective": objective, "acts": True}},
            )
            for objective, name in (("block", "blocks' errors"), ("latents", "latents' errors"), ("metrics", "metrics"))
        ),
        Method(
            "ViDiT-Q, bits by latents' errors, three at least", "vidit-q",
            {"allocate": {"budget": "same", "objective": "latents", "acts": True, "bits": [3, 4, 5, 6, 8]}},
        ),
        Method(
            "ViDiT-Q, bits of weights by latents' errors", "vidit-q",
            {"allocate": {"budget": "same", "objective": "latents"}},
        ),
    ),
)  # fmt: skip

BY_METRICS = {"budget": "same", "objective": "metrics", "acts": True}
LEADERBOARD = Study(
    "leaderboard",
    "Which system keeps the model's videos, at which size?",
    ((4, 6), (4, 4), (3, 6), (8, 8), (4, 8), (2, 6)),
    (
        Method("rtn", "rtn"),
        Method("smoothquant", "smoothquant"),
        Method("hadamard (QuaRot-style)", "hadamard"),
        Method("svdquant", "svdquant"),
        Method("vidit-q", "vidit-q"),
        Method("vidit-q, mixed by metrics", "vidit-q", {"allocate": BY_METRICS}),
        Method("q-vdit", "q-vdit"),
        Method("lrq-dit", "lrq-dit", least=3),
        Method("s2q-vdit", "s2q-vdit"),
        Method("efficientdm", "efficientdm"),
        Method("quantized-distillation", "quantized-distillation"),
        Method("qvgen", "qvgen"),
        Method("mpq-dm", "mpq-dm", most=7),
        Method("mpq-dmv2", "mpq-dmv2", most=7),
        Method("attar-ptq", "attar-ptq"),
        Method("attar-mixed", "attar-mixed"),
        Method("attar", "attar"),
        Method("attar, without branches", "attar", NO_BRANCH),
        Method("attar, activations alike", "attar", ACTS_ALIKE),
    ),
)

STUDIES = {
    study.name: study
    for study in (
        *(MAIN, LADDER, OUTLIERS, CLIPPING, ACCURACY, WEIGHT_ONLY),
        *(SELECTION, DISTILLATION, LEARNING, SYSTEMS, LRQ_DIT, SVDQUANT),
        *(*FORMATS, ROWS, OWN, TRAINING, PRECISION, MIXED, LEADERBOARD),
    )
}
