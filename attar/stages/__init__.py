"""The stages of a recipe: every setting with its default, its bounds and what it means."""

from attar.stages.base import Stage
from attar.stages.data import Select, Synthesize, Trace
from attar.stages.learning import Finetune, Reconstruct, Relation, Rounding
from attar.stages.other import Paper, TextEncoder
from attar.stages.quantize import Allocate, LowRank, Quantize, RowBits

__all__ = [
    "Allocate",
    "Finetune",
    "LowRank",
    "Paper",
    "Quantize",
    "Reconstruct",
    "Relation",
    "Rounding",
    "RowBits",
    "Select",
    "Stage",
    "Synthesize",
    "TextEncoder",
    "Trace",
]
