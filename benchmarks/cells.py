"""What the quality benchmark measures: methods as recipes with overrides, grouped into studies.

A cell is one (method, bits, seed). A study lists its methods once; the runner fills the cells one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A row of a table: a recipe with overrides."""

    name: str
    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A table: its methods at some bit widths."""

    name: str
    question: str
    bits: tuple[tuple[int, int], ...]
    methods: tuple[Method, ...]


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
        Method("attar-ptq (default)", "attar-ptq"),
    ),
)

NO_LEARNING = {"reconstruct": None, "quantize.weight_clip": False, "quantize.act_clip": False}
LADDER = Study(
    "ladder",
    "Does every part of the learned base lower the held-out block error?",
    ((4, 4),),
    (
        Method("round to nearest", "rtn"),
        Method("rotation", "hadamard"),
        Method("scaling", "smoothquant"),
        Method("scaling + rotation", "smoothquant", {"quantize.rotation": "hadamard"}),
        Method(
            "+ learned clipping", "learned-base",
            {"quantize.rotation": "hadamard", "reconstruct.train_scale": False},
        ),
        Method("+ learned rotation", "learned-base", {"reconstruct.train_scale": False}),
        Method("+ learned scale", "learned-base"),
        Method("+ GPTQ", "learned-base", {"rounding.method": "gptq"}),
    ),
)  # fmt: skip

POLICIES = (
    "salient", "salient_stratified", "last_steps", "random", "uniform_steps", "one_prompt_all_steps",
    "few_prompts_all_steps", "few_prompts_random_steps", "change", "amplification", "lowest",
)  # fmt: skip
SELECTION = Study(
    "selection",
    "Does it matter which samples are chosen? (plain error, nearest rounding)",
    ((4, 4),),
    tuple(Method(policy, "s2q-vdit", _base(select__policy=policy)) for policy in POLICIES),
)

DISTILLATION = Study(
    "distillation",
    "What does weighting tokens by attention do? (random samples, nearest rounding)",
    ((4, 4),),
    tuple(
        Method(
            f"λ_min = {low:g}",
            "s2q-vdit",
            _base(reconstruct__loss="token_weighted", reconstruct__lambda_min=low),
        )
        for low in (0.1, 0.25, 0.5, 0.75, 1.0)
    ),
)

LEARNING = Study(
    "learning",
    "Over-fitting, samples, propagation, and the kind of rotation (random samples, plain error, GPTQ)",
    ((4, 4),),
    tuple(
        Method(name, "s2q-vdit", {**BASE, "rounding.method": "gptq", **changes})
        for name, changes in (
            ("15 epochs, 40 samples, fp", {}),
            ("propagate quant", {"reconstruct.propagate": "quant"}),
            ("5 epochs", {"reconstruct.epochs": 5}),
            ("10 samples", {"select.count": 10}),
            ("20 samples", {"select.count": 20}),
            ("80 samples", {"select.count": 80}),
            ("affine Kronecker", {"quantize.affine": True}),
            ("fixed Hadamard", {"quantize.rotation": "hadamard"}),
            ("rotate, then scale", {"quantize.order": "rotate_then_scale"}),
        )
    ),
)

STUDIES = {study.name: study for study in (MAIN, LADDER, SELECTION, DISTILLATION, LEARNING)}
