"""A rotation for each layer by how large its inputs are (LRQ-DiT, arXiv 2508.03485, "ARS").

    J = ‖X‖_F / √(elements of X),   J < threshold: x -> x H,   J ≥ threshold: x -> x R1 Π R2

H is a random Hadamard rotation. R1, R2 are block-diagonal rotations found greedily on a batch of inputs, and Π deals
the largest channels out over the blocks (DuQuant, arXiv 2406.01721).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.errors import AttarError
from attar.quantize.transforms import FixedHadamard, FixedRotation
from attar.quantize.watch import watching
from attar.runtime.block_rotations import BlockRotations, block_width
from attar.runtime.reference import wide

STEPS = 256  # of the greedy search in each block; the best of its prefixes is kept
ROWS = 256  # tokens, evenly spaced in the first sample, that it looks at


@dataclass(frozen=True)
class InputSample:
    """What the calibration says of a layer's input. rms: J. peak: its largest magnitude. rows: (n, d), float32."""

    rms: float
    peak: float
    rows: Tensor

    def shifted(self, shift: Tensor) -> InputSample:
        """With the rows behind a channel shift (d,); J stays that of the input as it comes."""
        return replace(self, rows=self.rows - shift.to(self.rows))

    def scaled(self, scale: Tensor) -> InputSample:
        """With the rows behind a channel scale (d,); J stays that of the input as it comes."""
        return replace(self, rows=self.rows / scale.to(self.rows))


def adaptive_rotation(
    sample: InputSample, threshold: float, generator: torch.Generator | None = None
) -> FixedRotation:
    """The layer's rotation: a random Hadamard, or where J reaches the threshold the dual one.

    sample: its rows are what the rotation acts on.
    """
    if sample.rms < threshold:
        return FixedHadamard(sample.rows.shape[1], generator)
    return FixedRotation(dual_rotation(sample.rows, generator=generator))


def describe(sample: InputSample, threshold: float) -> dict[str, Any]:
    """The choice and both statistics, as JSON-able values. J grows with the input's unit, peak over J does not."""
    kind = "hadamard" if sample.rms < threshold else "dual"
    return {"rotation": kind, "rms": sample.rms, "peak_to_rms": sample.peak / max(sample.rms, 1e-30)}


def collect_input_samples(
    run: Callable[[Any], Any], calls: Iterable[Any], linears: Mapping[str, nn.Module]
) -> dict[str, InputSample]:
    """J and peak of every layer's input over all calls of all processes, and rows of the first call of the first one.

    run: runs the block on one call. Raises AttarError for a layer that no call reached.
    """
    squares = dict.fromkeys(linears, 0.0)
    numbers, peaks = dict.fromkeys(linears, 0.0), dict.fromkeys(linears, 0.0)
    rows: dict[str, Tensor] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        x = wide(x.detach()).flatten(0, -2)  # (tokens, d)
        squares[name] += x.square().sum(dtype=torch.float64).item()
        numbers[name] += x.numel()
        peaks[name] = max(peaks[name], x.abs().max().item())
        if name not in rows:
            places = torch.linspace(0, len(x) - 1, min(len(x), ROWS)).round().long()
            rows[name] = x[places.to(x.device)]

    with watching(linears, see):
        for call in calls:
            run(call)
    found = {}
    for name in linears:
        total, count = ranks.sums(squares[name], numbers[name])
        if not count:
            raise AttarError("a layer was not reached by any calibration call", where=name)
        peak = ranks.max_(torch.tensor(peaks[name], dtype=torch.float64)).item()
        device = next(linears[name].parameters()).device
        shared = ranks.first(lambda name=name: rows[name].cpu()).to(device)
        found[name] = InputSample((total / count) ** 0.5, peak, shared)
    return found


@torch.no_grad()
def dual_rotation(
    rows: Tensor, block: int | None = None, steps: int = STEPS, generator: torch.Generator | None = None
) -> BlockRotations:
    """R1 Π R2 for inputs like rows (n, d), in blocks of 128 channels or the largest divisor of d below it.

    The peak of rows in no block is larger behind R1 than before it, nor behind R2 than before that.
    """
    d = rows.shape[1]
    block = block_width(d) if block is None else block
    first = greedy_rotation(rows, block, steps, generator)
    between = BlockRotations(first[None], torch.empty(0, d, dtype=torch.int32, device=rows.device))(rows)
    order = zigzag(between.abs().amax(0), block)
    second = greedy_rotation(between[:, order], block, steps, generator)
    return BlockRotations(torch.stack([first, second]), order[None])


@torch.no_grad()
def greedy_rotation(
    rows: Tensor, block: int, steps: int = STEPS, generator: torch.Generator | None = None
) -> Tensor:
    """A rotation (d / block, block, block) that spreads the largest values of rows (n, d) over their block, float64.

    Each step swaps the channel of the block's largest value to the front and turns the block by an orthogonal matrix
    whose first row is constant, so that it is spread evenly; the prefix with the smallest peak is kept, the empty one
    included (DuQuant, algorithm 1).
    """
    n, d = rows.shape
    turn = _spreading(block, generator).to(rows)
    blocks = torch.arange(d // block, device=rows.device)
    # the identity below the rows becomes the product of the steps: (blocks, n + block, block)
    state = torch.cat(
        [rows.view(n, -1, block).transpose(0, 1), torch.eye(block).to(rows).expand(len(blocks), -1, -1)],
        dim=1,
    )
    peaks = state[:, :n].abs().amax(1)  # (blocks, block)
    smallest, best = peaks.amax(1), state[:, n:].clone()
    for _ in range(steps):
        largest = peaks.argmax(1)
        swapped = state.clone()
        swapped[blocks, :, 0], swapped[blocks, :, largest] = state[blocks, :, largest], state[blocks, :, 0]
        state = swapped @ turn
        peaks = state[:, :n].abs().amax(1)
        better = peaks.amax(1) < smallest
        smallest = torch.where(better, peaks.amax(1), smallest)
        best[better] = state[better, n:]
    u, _, v = torch.linalg.svd(best.double())  # many products in float32: back to the nearest rotation
    return u @ v


def zigzag(sizes: Tensor, block: int) -> Tensor:
    """An order of channels that deals them, from the largest of sizes (d,) down, to the blocks there and back again."""
    blocks = sizes.numel() // block
    dealt = sizes.argsort(descending=True, stable=True).view(block, blocks)
    dealt[1::2] = dealt[1::2].flip(-1)
    return dealt.T.flatten()


def _spreading(size: int, generator: torch.Generator | None) -> Tensor:
    """A random orthogonal matrix (size, size) whose first row is constant, float64."""
    start = torch.randn(size, size, dtype=torch.float64, generator=generator)
    start[:, 0] = 1
    return torch.linalg.qr(start)[0].T.contiguous()
