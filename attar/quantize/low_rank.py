"""A low-rank branch in high precision beside a quantized weight: W ≈ B A + Q(W - B A), or B A + Q(W)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attar.errors import AttarError
from attar.quantize.linear import QuantizedLinear
from attar.quantize.terms import kaiming_uniform, leading
from attar.runtime.formats import wide

_NARROWEST = 8  # times the rank; in a narrower layer a branch would be as large as what it is beside
GATES = ("none", "calibrated", "trained")


@dataclass(frozen=True)
class LowRankSettings:
    """How a branch starts.

    rank: of B A. start: "weight" takes the leading part of W itself and quantizes the rest (SVDQuant, arXiv
    2411.05007); "error" quantizes W first and takes the leading part of what is lost (LoftQ, arXiv 2310.08659); "zero"
    has random A and B = 0, for a branch that is trained (Q-VDiT, arXiv 2505.22167).
    subtract: whether the quantized weight is W - B A, or W, to which the branch is an estimate of the error (Q-VDiT).
    iterations: times that the branch is taken anew from W - Q(W - B A); the best of all is kept; with `subtract` only,
    since Q(W) does not change. metric: what "leading" and "best" mean, "weight": the squared error of the weight;
    "output": that of the layer's output on the calibration inputs, whose optimum is the SVD of the error times the
    square root of their second moment.
    rounded_inputs: a branch only beside layers whose inputs are rounded, and whose narrower side is at least 8 times
    the rank; else in any layer.
    gate: over the frames of a video, "none", "calibrated" or "trained" (frame_gate.py); with `subtract` none, since
    W - B A + M B A is not W.
    """

    rank: int = 32
    start: str = "weight"
    iterations: int = 1
    metric: str = "weight"
    subtract: bool = True
    gate: str = "none"
    rounded_inputs: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.iterations < 0:
            raise AttarError(f"a branch cannot have rank {self.rank} and {self.iterations} iterations")
        if self.start not in ("weight", "error", "zero") or self.metric not in ("weight", "output"):
            raise AttarError(f"a branch knows no start {self.start!r} with the metric {self.metric!r}")
        if self.gate not in GATES:
            raise AttarError(f"a branch knows no gate {self.gate!r}", fix=f"Use {', '.join(GATES)}")
        if self.gate != "none" and self.subtract:
            raise AttarError(
                "a gate over frames needs a branch that is not subtracted from the weight",
                fix="Set subtract to false, or gate to none",
            )
        if self.start == "weight" and not self.subtract:
            raise AttarError(
                "a branch that is part of the weight must be subtracted from it",
                fix="Use the start error or zero",
            )

    @property
    def candidates(self) -> int:
        """Branches of which the best is kept."""
        return 1 + (self.iterations if self.subtract and self.start != "zero" else 0)

    @property
    def sees_rounding(self) -> bool:
        """Whether the branch depends on how the weight is rounded without it, or with another one."""
        return self.start == "error" or self.candidates > 1

    def rank_for(self, in_features: int, out_features: int, act_bits: int | None) -> int:
        """Of the branch of a layer, 0 for none. act_bits: of its inputs, None for floats.

        Raises AttarError for a layer that is too narrow for a branch that it has to have.
        """
        narrower = min(in_features, out_features)
        if self.rounded_inputs:
            return self.rank if act_bits is not None and self.rank * _NARROWEST <= narrower else 0
        if self.rank > narrower:
            raise AttarError(
                f"a branch of rank {self.rank} is no smaller than the layer", fix="Choose a smaller rank"
            )
        return self.rank


@torch.no_grad()
def start_branch(
    layer: QuantizedLinear,
    settings: LowRankSettings,
    moment: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Gives the layer its branch; returns the relative squared error of every candidate, of several, in their order.

    moment: (in, in), the mean of x̃ᵀx̃ over the layer's transformed inputs, for the metric "output". generator: of the
    random start (CPU).
    Everything else is computed in the transformed basis, in which the layer quantizes, with the quantizer as it is now.
    Raises AttarError when the rank exceeds the layer's width, or there is no moment.
    """
    weight = layer.transformed_weight()  # (out, in)
    if settings.rank > min(weight.shape):
        raise AttarError(f"a branch of rank {settings.rank} does not fit {tuple(weight.shape)}")
    if settings.start == "zero":
        down = kaiming_uniform(settings.rank, layer.in_features, generator)
        up = weight.new_zeros(layer.out_features, settings.rank)
        layer.set_branch(down.to(weight.device), up, settings.subtract)
        return []
    root, back = _whitening(settings, moment)
    rest = weight if settings.start == "weight" else weight - layer.rounded(weight)
    if settings.candidates == 1:  # nothing to compare it with
        up, down = _leading(rest, settings.rank, root, back)
        layer.set_branch(layer.to_original(down), up, settings.subtract)
        return []
    size = _norm(weight if root is None else weight @ root)
    found: list[tuple[float, Tensor, Tensor]] = []
    for _ in range(settings.candidates):
        up, down = _leading(rest, settings.rank, root, back)
        quantized = layer.rounded(weight - up @ down if settings.subtract else weight)
        error = weight - quantized - up @ down
        found.append((_norm(error if root is None else error @ root) / size, up, down))
        rest = weight - quantized
    _, up, down = min(found, key=lambda candidate: candidate[0])
    layer.set_branch(layer.to_original(down), up, settings.subtract)
    return [error for error, _, _ in found]


def _leading(matrix: Tensor, rank: int, root: Tensor | None, back: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B (out, rank), A (rank, in)), the best approximation of that rank."""
    up, down = leading(matrix if root is None else matrix @ root, rank)
    return up, down if back is None else down @ back


def _whitening(settings: LowRankSettings, moment: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(C^{1/2}, C^{-1/2}) of the inputs' second moment, (None, None) for the metric "weight".

    Directions below a millionth of the largest one count as if they had that much.
    """
    if settings.metric == "weight":
        return None, None
    if moment is None:
        raise AttarError("a branch with the metric 'output' needs calibration inputs")
    values, vectors = torch.linalg.eigh(moment.double())
    roots = values.clamp(min=values.max().item() * 1e-6).sqrt()
    root, back = ((vectors * r) @ vectors.T for r in (roots, 1 / roots))
    return wide(root.float()), wide(back.float())


def _norm(matrix: Tensor) -> float:
    return matrix.double().square().sum().item()
