"""What the parts of systems that train whole models give: each system without a part, on digits-image.

The cells are those of `python -m benchmarks.pictures --only "quest, all layers"` and the like; the table stands below
its tables of systems.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.ablations import decibels, sizes_text

MODEL = "digits-image"
TITLE = f"What the parts of trained systems give, {MODEL}"
COLUMNS = ("system", "part", "bits", "seeds", "PSNR, dB", "linears")
INTRO = """Change of the pictures' PSNR by one part of a system, everything else the same, with the 95 % t-interval
of the mean, paired over pictures where there is one seed, else over seeds. An interval that holds 0
says that the part gave nothing that these pictures can show. The last column is the layers' measured
bytes against bfloat16, without the part and with it. A layer with rows of several widths has a byte
more for each row, and tables where their codes are residual: sizes that hardly differ say that hardly
any layer has such rows. At two bits they do differ.
"""


@dataclass(frozen=True)
class Part:
    """A part of a system. other: the name of the cells of the system without it, or with it where it is no default;
    overrides: what makes these of the system's recipe."""

    system: str
    name: str
    other: str
    overrides: dict[str, Any] = field(default_factory=dict)
    default: bool = True

    @property
    def sides(self) -> tuple[str, str]:
        """The names of cells without the part and with it."""
        return (self.other, self.system) if self.default else (self.system, self.other)


NO_RELATION = {"finetune.relation": None}
PARTS = (
    Part("efficientdm", "merged adapters", "efficientdm, ranges alone", {"finetune.adapter_rank": 0}),
    Part(
        "efficientdm", "clipping by groups of steps", "efficientdm, clipping by groups of steps",
        {"quantize.step_groups": 4, "quantize.clip_by_group": True}, default=False,
    ),
    Part("quest", "chosen layers alone", "quest, all layers", {"finetune.layers": None}),
    Part("quest", "outputs of time projections", "quest, the model's output alone", {"finetune.local": None}),
    Part("mpq-dm", "rows by kurtosis", "mpq-dm, all rows alike", {"quantize.row_bits": None}),
    Part("mpq-dm", "relations", "mpq-dm, without relations", NO_RELATION),
    Part("mpq-dmv2", "residual codes", "mpq-dmv2, integers", {"quantize.row_bits.salient_format": "int"}),
    Part("mpq-dmv2", "start from the error", "mpq-dmv2, start from zero", {"finetune.adapter_start": "rounded"}),
    Part("mpq-dmv2", "relations with a memory", "mpq-dmv2, without relations", NO_RELATION),
    Part(
        "quantized-distillation", "trained numbers", "quantized-distillation, trained numbers",
        {"quantize.weight_format": "lloyd", "finetune.level_lr": 1e-3}, default=False,
    ),
    Part("qvgen", "branches that decay", "qvgen, without branches", {"finetune.auxiliary_rank": 0}),
    Part("qvgen", "rank halved, not cut at once", "qvgen, cut at once", {"finetune.auxiliary_keep": 0.0}),
)  # fmt: skip
VARIANTS = {part.other: (part.system, part.overrides) for part in PARTS}


def rows(cells: dict[str, Any], bits: tuple[str, ...]) -> list[list[str]]:
    """Figures in the order of COLUMNS, a row for each part and width that both sides were measured at."""
    found = []
    for part in PARTS:
        for width in bits:
            without, having = (f"{MODEL}|{side}|{width}|" for side in part.sides)
            seeds = sorted(name.rsplit("|", 1)[1] for name in cells if name.startswith(without))
            pairs = [
                (cells[without + seed], cells[having + seed]) for seed in seeds if having + seed in cells
            ]
            if pairs:
                means = (sum(c["linears"] for c in side) / len(side) for side in zip(*pairs, strict=True))
                sizes = sizes_text(*means, digits=4)
                found.append([part.system, part.name, width, str(len(pairs)), decibels(pairs), sizes])
    return found
