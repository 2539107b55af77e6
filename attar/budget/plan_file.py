"""The plan as a file that people read and edit: a line for every layer, with what it was chosen by as a comment.

format: 1
model:
  transformer: WanTransformer3DModel 5b1f0c6a9d3e
layers:
  transformer:
    blocks.0.attn1.to_q: {weights: 3}  # self_attn.q, 256 x 256; error 2: 1.9e-02, 3: 3.2e-03, 4: 7.7e-04
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from attar.errors import AttarError, reason
from attar.files import writing

FORMAT = 1
HEAD = """\
# Bits of each layer, chosen by attar. Edit them and give the file back: attar compress MODEL --plan FILE
# with the recipe, --weights and --acts that it was made with (below), which say what else there is. A plan that was
# made beside branches is refused without them, unless the line that gives their rank is deleted.
# A layer may have weights (2 to 8, or 16 to keep it), acts, and skip: true. Layers that are not listed, and whatever
# is not said of a layer, are as the recipe has them. Names may have the wildcards of a shell; later lines win.
"""


@dataclass(frozen=True)
class PlanFile:
    """Overrides for the layers of the model that the plan was made for.

    model: component -> identity of its linears. layers: component -> layer -> {weights, acts, skip}.
    where: the file, for errors. branch_rank: of the branches that bits were chosen beside, None where nothing is said.
    """

    model: Mapping[str, str]
    layers: Mapping[str, Mapping[str, Mapping[str, Any]]]
    where: str = "plan"
    branch_rank: int | None = None

    def check(self, model: Mapping[str, str]) -> None:
        """Raises AttarError if the plan is of a model with other linears."""
        if dict(self.model) != dict(model):
            theirs, ours = (", ".join(f"{k}: {v}" for k, v in m.items()) for m in (self.model, model))
            raise AttarError(
                f"the plan was made for another model ({theirs}; this one is {ours})",
                where=self.where,
                fix="Make one for this model with attar allocate",
            )
        unknown = sorted(set(self.layers) - set(model))
        if unknown:
            raise AttarError(f"the model has no component {unknown[0]!r}", where=self.where)

    def check_branch(self, rank: int | None) -> None:
        """Raises AttarError if the plan was made beside branches, and those of the recipe have another rank or none."""
        if self.branch_rank is not None and self.branch_rank != rank:
            raise AttarError(
                f"the plan was made for layers with branches of rank {self.branch_rank}, and the recipe has "
                + ("none at these bits" if rank is None else f"some of rank {rank}"),
                where=self.where,
                fix="Give the recipe, --weights and --acts that the plan was made with, or delete branch_rank in it",
            )

    def overrides(self) -> dict[str, dict[str, Any]]:
        """As `quantize.roles` takes them, with the component in front of the layer's name."""
        return {
            f"{component}.{name}": dict(options)
            for component, layers in self.layers.items()
            for name, options in layers.items()
        }


def read_plan(path: str | Path) -> PlanFile:
    """Raises AttarError for a file that is missing, no plan, or of a newer format. Bits are checked with the model."""
    where = str(path)
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AttarError("no such plan file", where=where, fix="Write one with attar allocate") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AttarError(f"the plan cannot be read ({reason(error)})", where=where) from error
    if not isinstance(content, dict) or "format" not in content:
        raise AttarError("the file is no plan", where=where, fix="Write one with attar allocate")
    if content["format"] != FORMAT:
        raise AttarError(
            f"the plan has format {content['format']!r}, this attar reads {FORMAT}",
            where=where,
            fix="Update attar",
        )
    unknown = sorted(map(str, content.keys() - {"format", "model", "chosen", "layers"}))
    if unknown:
        raise AttarError(f"unknown key {unknown[0]!r} in the plan", where=where)
    model, layers = content.get("model"), content.get("layers")
    if not isinstance(model, dict) or not isinstance(layers, dict):
        raise AttarError("a plan needs model and layers", where=where)
    for component, named in layers.items():
        for name, options in (named if isinstance(named, dict) else {None: None}).items():
            if not isinstance(options, dict):
                place = component if name is None else f"{component}.{name}"
                fix = "Write one line for each layer, such as blocks.0.attn1.to_q: {weights: 3}"
                raise AttarError(f"the plan says nothing readable of {place}", where=where, fix=fix)
    chosen = content.get("chosen")
    rank = chosen.get("branch_rank") if isinstance(chosen, dict) else None
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise AttarError(f"branch_rank is {rank!r}, not a rank", where=where)
    return PlanFile(model, layers, where, rank)


def write_plan(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plan_text(
    model: Mapping[str, str],
    chosen: Mapping[str, Any],
    layers: Mapping[str, Iterable[tuple[str, Mapping[str, int | list[int]], str]]],
) -> str:
    """The file's text. chosen: what the plan was chosen by and comes to, for the reader. layers: component -> (layer,
    {"weights": bits, "acts": bits} or one of them, comment); acts may be a list by groups of steps."""
    parts = [HEAD, _yaml({"format": FORMAT, "model": dict(model), "chosen": dict(chosen)}), "layers:\n"]
    for component, rows in layers.items():
        parts.append(f"  {component}:\n")
        for name, bits, comment in rows:
            options = ", ".join(f"{key}: {count}" for key, count in bits.items())
            parts.append(f"    {name}: {{{options}}}  # {comment}\n")
    return "".join(parts)


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000)
