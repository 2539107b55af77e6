"""Low-rank matrices that are added to a weight while its layer is trained, before or behind its rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attar.errors import AttarError

_SKETCHED = 32  # times the rank, from which on a randomised SVD is used
_OVERSAMPLED = 8


class LowRankTerm(nn.Module):
    """L diag(γ) R, to be added to a weight of shape (out, in).

    Added before rounding it is a merged adapter, Q(W + L R) (EfficientDM, arXiv 2310.03270, eq. of QALoRA; L is its B
    and R its A). Behind rounding it is an auxiliary branch on the quantized activations, Q(W) + L diag(γ) R, which has
    to be gone before the layer is packed (QVGen, arXiv 2505.11497).
    up L: (out, rank). down R: (rank, in). gate γ: (rank,), ones at first, set by a schedule and not trained.
    """

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        # rows one after another, as stored tensors are: a fused optimizer reads its moments in the factors' order
        self.up, self.down = (nn.Parameter(_copy(part)) for part in (up, down))
        self.gate = nn.Parameter(up.new_ones(up.shape[1]), requires_grad=False)

    @classmethod
    def nothing(cls, weight: Tensor, rank: int, generator: torch.Generator) -> LowRankTerm:
        """A term that starts as zero: R uniform in ±1/√in (Kaiming's with slope √5), L = 0. generator: on the CPU.

        weight: (out, in), whose device and type are taken. Raises AttarError for a rank that does not fit.
        """
        _check(rank, weight)
        down = kaiming_uniform(rank, weight.shape[1], generator)
        return cls(weight.new_zeros(weight.shape[0], rank), down.to(weight))

    @classmethod
    @torch.no_grad()
    def leading(cls, matrix: Tensor, rank: int) -> LowRankTerm:
        """The best approximation of a matrix (out, in): L = U √S, R = √S Vᵀ of its largest singular values.

        Raises AttarError for a rank that does not fit.
        """
        _check(rank, matrix)
        return cls(*leading(matrix, rank))

    @property
    def rank(self) -> int:
        return self.gate.numel()

    def forward(self) -> Tensor:
        """The matrix (out, in)."""
        return (self.up * self.gate) @ self.down

    @torch.no_grad()
    def fade(self, keep: int, share: float) -> None:
        """Gives the first `keep` directions the gate 1, and the others `share`."""
        self.gate.fill_(share)
        self.gate[:keep] = 1.0

    @torch.no_grad()
    def truncate(self, keep: int) -> None:
        """Keeps the first directions, as singular vectors of their product: LᵀL = R Rᵀ = diag(S), S falling.

        The parameters are new objects afterwards, so optimizers have to be given them again.
        """
        # singular values of L R from two small triangles; the matrix itself is never built
        left, a = torch.linalg.qr(self.up[:, :keep].double())
        right, b = torch.linalg.qr(self.down[:keep].double().T)
        u, s, v = torch.linalg.svd(a @ b.T)
        root = s.sqrt()
        up, down = (left @ u) * root, root[:, None] * (v @ right.T)
        self.up, self.down = (nn.Parameter(_copy(part.to(self.up))) for part in (up, down))
        self.gate = nn.Parameter(self.gate.new_ones(keep), requires_grad=False)


def _copy(part: Tensor) -> Tensor:
    return part.detach().clone(memory_format=torch.contiguous_format)


def kaiming_uniform(rank: int, width: int, generator: torch.Generator | None) -> Tensor:
    """(rank, width) on the CPU, uniform in ±1/√width: Kaiming's with slope √5, from which LoRA's A starts."""
    bound = width**-0.5
    return torch.empty(rank, width).uniform_(-bound, bound, generator=generator)


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(L (out, rank), R (rank, in)): L R is the best approximation of that rank; L = U √S, R = √S Vᵀ.

    Of matrices at least 32 times as wide as the rank by a randomised SVD (Halko et al., arXiv 0909.4061) with a fixed
    seed, which takes a small part of the time.
    """
    if _SKETCHED * rank > min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            _generator_of(matrix.device).manual_seed(0)  # torch.manual_seed would reseed every device
            left, values, right_t = torch.svd_lowrank(matrix, rank + _OVERSAMPLED, niter=4)
        right = right_t.T
    share = values[:rank].sqrt()
    return left[:, :rank] * share, share[:, None] * right[:rank]


def _generator_of(device: torch.device) -> torch.Generator:
    """From which functions without a generator of their own draw there."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def _check(rank: int, matrix: Tensor) -> None:
    if not 1 <= rank <= min(matrix.shape):
        raise AttarError(
            f"a matrix of {tuple(matrix.shape)} has no part of rank {rank}", fix="Choose a smaller rank"
        )
