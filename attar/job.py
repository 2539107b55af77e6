"""What every way to compress one transformer is given."""

from __future__ import annotations

from torch import nn

from attar.calibration.store import TraceStore
from attar.models.adapter import ModelAdapter
from attar.models.arithmetic import Arithmetic
from attar.models.weights import weights_of
from attar.progress import Progress
from attar.quantize.plan import LayerPlan
from attar.recipe import Recipe
from attar.workspace import Workspace


class Job:
    """One transformer, which is compressed in place, and all that decides how.

    name: of the component in its pipeline. plan: of every linear; those that are quantized are kept, by name. store:
    the traces. seed: of everything random. What is finished is kept in the workspace.
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
    ) -> None:
        self.name, self.transformer, self.recipe = name, transformer, recipe
        self.plan = {p.name: p for p in plan if not p.skipped}
        self.workspace, self.store, self.seed, self.progress = workspace, store, seed, progress
        self.adapter = ModelAdapter.of(transformer)
        self.weights = weights_of(transformer)
        self.device = self.weights.device
        self.arithmetic = Arithmetic.of(transformer, recipe.precision)
