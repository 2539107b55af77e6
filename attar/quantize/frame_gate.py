"""The gate of a low-rank branch: one number for each frame, by which what the branch adds is multiplied.

Q-VDiT (arXiv 2505.22167, TQE), where it makes the branch "token-aware":

    M_i = η_i / ω_i,   η_i = softmax_i(1 - ρ(X_i, Q(X)_i)),   ω_i = Σ|X_i| / Σ_v Σ|X_v|

X_i are a layer's inputs in frame i, ρ is Pearson's correlation. The released code trains M from ones instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attar import ranks
from attar.errors import AttarError
from attar.quantize.linear import QuantizedLinear
from attar.quantize.plan import LayerPlan
from attar.quantize.watch import watching

KEY = "quantize.low_rank.gate"
_WITHOUT = "Set it to none"
_MOMENTS = 7  # of each frame: how many numbers, Σx, ΣQ, Σx², ΣQ², ΣxQ, Σ|x|


@dataclass(frozen=True)
class FrameGrid:
    """The tokens of a video: `frames` frames one after another. Raises AttarError for fewer than two frames."""

    frames: int
    tokens: int

    def __post_init__(self) -> None:
        if self.frames < 2 or self.tokens % self.frames:
            raise AttarError(
                f"{self.tokens} tokens of {self.frames} frame{'s' * (self.frames != 1)} are no video, whose frames a "
                "gate tells apart",
                where=KEY,
                fix=_WITHOUT,
            )


@torch.no_grad()
def start_gates(
    layers: Mapping[str, QuantizedLinear],
    plans: Mapping[str, LayerPlan],
    grid: FrameGrid,
    run: Callable[[Any], Any],
    calls: Iterable[Any],
    trained: bool,
) -> dict[str, Tensor | None]:
    """Gives every layer that reads the video's tokens alone a gate; name → M (frames,), or None for the others.

    Those are layers whose input is (B, tokens of the grid, C) in every call of all processes, and whose role is none
    that reads text, which may have as many tokens by chance. layers: with their branches. run: runs the block on one
    call. trained: M starts at ones and learns with the branch; else it is the paper's, and stays.
    Raises AttarError where M is not finite, as for a frame that is zero throughout.
    """
    sums: dict[str, Tensor] = {}
    seen, others = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def see(name: str, layer: QuantizedLinear, x: Tensor) -> None:
        seen[name] += 1
        if x.ndim != 3 or x.shape[1] != grid.tokens:
            others[name] += 1
        elif not trained:
            found = moments_of(*layer.quantized_input(x), grid.frames)
            sums[name] = sums[name] + found if name in sums else found

    asked = {name: layer for name, layer in layers.items() if not _reads_text(plans[name].role)}
    with watching(asked, see):
        for call in calls:
            run(call)
    gates: dict[str, Tensor | None] = dict.fromkeys(layers)
    for name, layer in asked.items():
        reached, elsewhere = ranks.sums(seen[name], others[name])
        if not reached or elsewhere:
            continue
        gate = torch.ones(grid.frames, device=layer.weight.device)
        if not trained:
            none = gate.new_zeros(_MOMENTS, grid.frames, dtype=torch.float64)
            gate = frame_gate(ranks.sum_(sums.get(name, none))).to(gate)
        if not bool(torch.isfinite(gate).all()):
            raise AttarError(
                f"the gate over frames is {gate.tolist()}",
                where=plans[name].name,
                fix=f"{_WITHOUT}, or skip the layer",
            )
        layer.set_gate(gate, trained)
        gates[name] = gate
    return gates


def frame_gate(moments: Tensor) -> Tensor:
    """M (frames,). moments: (7, frames), as `moments_of` gives them, added up over calls.

    Frames that are as large, and rounded alike, have M = 1. Not finite where a frame has no variance.
    """
    count, x, q, xx, qq, xq, size = moments
    covariance = xq - x * q / count
    rho = covariance / ((xx - x * x / count) * (qq - q * q / count)).sqrt()
    return (1 - rho).softmax(0) / (size / size.sum())


def moments_of(x: Tensor, quantized: Tensor, frames: int) -> Tensor:
    """(7, frames) in float64: how many numbers a frame has, and the sums of x, Q, x², Q², xQ and |x| over them.

    x, quantized: (B, N, C), frame after frame along N.
    """
    found = []  # frame by frame: in float64 the products of a whole input are many times the input
    for own, rounded in zip(*(t.unflatten(1, (frames, -1)).unbind(1) for t in (x, quantized)), strict=True):
        a, b = own.double(), rounded.double()
        sums = [a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum(), a.abs().sum()]
        found.append(torch.stack([a.new_tensor(a.numel()), *sums]))
    return torch.stack(found, 1)


def _reads_text(role: str) -> bool:
    kind, _, leaf = role.partition(".")
    return (
        kind == "ffn_context"
        or leaf.startswith("add_")
        or role in {f"cross_attn.{p}" for p in ("k", "v", "kv")}
    )
