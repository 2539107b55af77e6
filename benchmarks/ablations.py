"""What the parts of each system give: the system with a part beside the system without it, paired.

The cells are those of the studies of `python -m benchmarks.quality`, on digits-video; the table stands on the page of
`python -m benchmarks.leaderboard`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attar.evaluate.statistics import Estimate, paired_difference
from attar.models.source import find_source, load_pipeline
from benchmarks.cells import STUDIES, block_error, digest, find_cell, seeds_of
from benchmarks.sizes import planned_ratio
from benchmarks.tables import estimate_text

BITS = ((4, 6), (4, 4), (3, 6))
COLUMNS = ("system", "part", "bits", "seeds", "block error, %", "PSNR, dB", "linears")
INTRO = """Change by one part of a system, everything else the same: of the held-out block error (less is better) and of
the videos' PSNR (more is better; a dash where only blocks were measured), with the 95 % t-interval of the mean,
paired over seeds, or over prompts where there is one seed. An interval that holds 0 says that the part gave
nothing that these seeds can show. Block errors of one seed have no interval. The last column is the linears'
planned bytes against bfloat16, without the part and with it; where they hardly differ a part may have changed
nothing: rows by kurtosis with plain rounding move no row at four and three bits, since that lowers the error of
no layer (the byte a row that is planned is then not stored), and 98 of 100 at two bits, where such rows pay:
mpq-dmv2 and mpq-dm beside efficientdm at W2A6.
"""


@dataclass(frozen=True)
class Part:
    """A part of a system, and the methods of a study that are the system without and with it."""

    system: str
    name: str
    study: str
    without: str
    having: str


PARTS = (
    Part("S²Q-VDiT", "salient samples (SDS)", "main", "learned base", "base + SDS"),
    Part("S²Q-VDiT", "token weights (STD)", "main", "learned base", "base + STD"),
    Part("S²Q-VDiT", "GPTQ", "main", "S²Q-VDiT without GPTQ", "S²Q-VDiT (with GPTQ)"),
    Part(
        "S²Q-VDiT",
        "both, against random samples and plain error",
        "main",
        "learned base + GPTQ",
        "S²Q-VDiT (with GPTQ)",
    ),
    Part("ViDiT-Q", "channel scale", "systems", "ViDiT-Q without scale", "ViDiT-Q"),
    Part("ViDiT-Q", "rotation", "systems", "ViDiT-Q without rotation", "ViDiT-Q"),
    Part(
        "ViDiT-Q",
        "a metric for each group of layers",
        "mixed",
        "ViDiT-Q, bits by latents' errors",
        "ViDiT-Q, bits by metrics",
    ),
    Part("ViDiT-Q", "bits by layer, by metrics", "leaderboard", "vidit-q", "vidit-q, mixed by metrics"),
    Part("Q-VDiT", "quantization estimator (TQE)", "systems", "Q-VDiT without TQE", "Q-VDiT"),
    Part("Q-VDiT", "temporal distillation (TMD)", "systems", "Q-VDiT without TMD", "Q-VDiT"),
    Part("LRQ-DiT", "twin-log weights", "lrq-dit", "+ adaptive rotation", "LRQ-DiT (both)"),
    Part("LRQ-DiT", "adaptive rotation", "lrq-dit", "+ twin-log weights", "LRQ-DiT (both)"),
    Part("SVDQuant", "low-rank branch", "svdquant", "SVDQuant without branch", "SVDQuant"),
    Part("SVDQuant", "channel scale", "svdquant", "SVDQuant without scale", "SVDQuant"),
    Part("MPQ-DM", "rows by kurtosis, plain rounding", "rows", "rtn", "rtn, rows by kurtosis"),
    Part(
        "MPQ-DMv2",
        "residual codes in these rows",
        "rows",
        "rtn, rows by kurtosis",
        "rtn, rows by kurtosis, residual",
    ),
    Part("QVGen", "rank decay", "training", "QVGen, branches removed at once", "QVGen"),
    Part("attar-mixed", "bits by layer", "leaderboard", "attar-ptq", "attar-mixed"),
    Part("attar", "branches of rank 8", "leaderboard", "attar, without branches", "attar"),
    Part(
        "attar",
        "bits of activations by layer",
        "leaderboard",
        "attar, activations alike",
        "attar, without branches",
    ),
    Part("attar", "bits of weights by layer", "own", "attar, same bits", "attar, activations alike"),
    Part("attar", "shifts", "own", "without shifts", "attar, same bits"),
    Part("attar", "all codes of activations", "own", "activations without the last code", "attar, same bits"),
    Part("attar", "searched clipping", "own", "without clip search", "attar, same bits"),
    Part("attar", "GPTQ of the whole weight", "own", "GPTQ of the clipped weight", "attar, same bits"),
    Part("attar", "largest inputs first", "own", "columns in their own order", "attar, same bits"),
    Part("attar", "learned transforms", "own", "without learning", "attar, same bits"),
)


def rows(cells: dict[str, Any]) -> list[list[str]]:
    """Figures in the order of COLUMNS, a row for each part and width that both sides were measured at."""
    found = []
    components = {"transformer": load_pipeline(find_source("digits-video")).transformer}
    ratios: dict[str, float] = {}  # by what a recipe does
    for part in PARTS:
        study = STUDIES[part.study]
        methods = {method.name: method for method in study.methods}
        for bits in sorted({*study.bits} & {*BITS}, key=BITS.index):
            sides = (methods[part.without], methods[part.having])
            if len({digest(method.resolve(bits)) for method in sides}) == 1:
                continue  # the system has no such part at these bits
            pairs = [tuple(find_cell(cells, study, m, bits, seed) for m in sides) for seed in seeds_of(cells)]
            kept = [(a, b) for a, b in pairs if a is not None and b is not None]
            if kept:
                width = f"W{bits[0]}A{bits[1]}"
                for recipe in (method.resolve(bits) for method in sides):
                    if digest(recipe) not in ratios:
                        ratios[digest(recipe)] = planned_ratio(components, recipe)
                sizes = sizes_text(*(ratios[digest(method.resolve(bits))] for method in sides))
                figures = [_percent(kept), decibels(kept), sizes]
                found.append([part.system, part.name, width, str(len(kept)), *figures])
    return found


Pairs = list[tuple[dict[str, Any], dict[str, Any]]]


def _percent(pairs: Pairs) -> str:
    after = [100 * block_error(b) / block_error(a) for a, b in pairs]
    return estimate_text(paired_difference([100.0] * len(after), after), 1, "+")


def sizes_text(without: float, having: float, digits: int = 3) -> str:
    """As in 0.259× → 0.267×."""
    return f"{without:.{digits}f}× → {having:.{digits}f}×"


def decibels(pairs: Pairs) -> str:
    """The change of PSNR as the table has it; a dash where only blocks were measured."""
    change = gain(pairs)
    return "–" if change is None else estimate_text(change, 2, "+")


def gain(pairs: Pairs) -> Estimate | None:
    """Change of PSNR from the first cell of each pair to the second: over seeds, or over prompts where there is one.

    None where only blocks were measured.
    """
    if not all("psnr" in cell for pair in pairs for cell in pair):
        return None
    if len(pairs) == 1:
        return paired_difference(*(cell["psnr"] for cell in pairs[0]))
    before, after = (
        [sum(cell["psnr"]) / len(cell["psnr"]) for cell in side] for side in zip(*pairs, strict=True)
    )
    return paired_difference(before, after)
