"""What every way to compress one transformer is given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from attar.calibration.store import TraceStore
from attar.models.adapter import ModelAdapter
from attar.models.arithmetic import Arithmetic
from attar.models.weights import weights_of
from attar.progress import Progress
from attar.quantize.plan import LayerPlan
from attar.recipe import Recipe
from attar.runtime.patches import stored_type
from attar.workspace import Workspace


class Job:
    """One transformer, which is compressed in place, and all that decides how.

    name: of the component in its pipeline. plan: of every linear; those that are quantized are kept, by name. store:
    the traces. seed: of everything random. stored: types of the tensors of its source by name, in which `attar.save`
    writes what comes out; empty where there is no source. What is finished is kept in the workspace.
    """

    def __init__(
        self,
        name: str,
        transformer: nn.Module,
        plan: list[LayerPlan],
        recipe: Recipe,
        workspace: Workspace,
        store: TraceStore,
        seed: int,
        progress: Progress,
        stored: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.name, self.transformer, self.recipe = name, transformer, recipe
        self.plan = {p.name: p for p in plan if not p.skipped}
        self.workspace, self.store, self.seed, self.progress = workspace, store, seed, progress
        self.stored = stored or {}
        self.adapter = ModelAdapter.of(transformer)
        self.weights = weights_of(transformer)
        self.device = self.weights.device
        self.arithmetic = Arithmetic.of(transformer, recipe.precision)

    def deployed(self, types: Mapping[str, torch.dtype], prefix: str = "") -> dict[str, torch.dtype]:
        """The narrowest type that each planned layer passes through on its way to the files.

        types: of the tensors now, by their names behind `prefix`; the result has the layers' weights by such names.
        """
        found = {}
        for name in self.plan:
            key = f"{name.removeprefix(prefix)}.weight"
            if name.startswith(prefix) and key in types:
                both = (types[key], stored_type(name, self.stored, types[key]))
                found[key] = max(both, key=lambda kind: torch.finfo(kind).eps)
        return found
