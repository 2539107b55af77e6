"""Learnable equivalent transforms of a linear layer, and how they start.

    x Wᵀ = [(x ⊘ c) R] · [(W ⊙ c) R^{-T}]ᵀ                  (S²Q-VDiT's base: SmoothQuant's c, FlatQuant's R)

Every transform gives `matrices()`, evaluated once in a forward pass and shared by both sides;
`forward(x, m)`, the activation side x T; `weight_side(w, m)`, W T^{-T}; and `bake()`, the run-time transform
with the same values, evaluated in float64.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.quantize.compiled import LARGEST_CAYLEY, CayleyMatrices, KroneckerRows, compiled_for
from attar.runtime import transforms as runtime
from attar.runtime.hadamard import base_order
from attar.runtime.reference import wide

Matrices = tuple[Tensor, ...]


class LearnedTransform(Protocol):
    """What QuantizedLinear asks of a transform (all of them are nn.Modules)."""

    def matrices(self) -> Matrices: ...
    def __call__(self, x: Tensor, m: Matrices) -> Tensor: ...
    def weight_side(self, weight: Tensor, m: Matrices) -> Tensor: ...
    def bake(self) -> runtime.Transform: ...


# ------------------------------------------------------------------------------------------------ scale


def smooth_scale(
    act_absmax: Tensor, weight_absmax: Tensor, alpha: float = 0.5, floor: float = 1e-5
) -> Tensor:
    """SmoothQuant's channel scale c_k = max(x̄_k^α / w̄_k^(1−α), 1e-5); activations are divided by c.

    act_absmax x̄, weight_absmax w̄: (d_in,). A channel that was always zero, in the activation or in the
    weight, gets the geometric mean of the others: 1e-5 would blow up the first non-zero value at run time.
    Raises AttarError when a statistic is not finite.
    """
    x, w = act_absmax.double(), weight_absmax.double()
    if not (torch.isfinite(x).all() and torch.isfinite(w).all()):
        raise AttarError("a channel's absolute maximum is not finite", fix="Check the block's inputs for NaN")
    live = (x > 0) & (w > 0)
    if not live.any():
        return torch.ones_like(act_absmax, dtype=torch.float32)
    scale = (x.clamp_min(1e-30).pow(alpha) / w.clamp_min(1e-30).pow(1 - alpha)).clamp_min(floor)
    return torch.where(live, scale, scale[live].log().mean().exp()).float()


class LearnedScale(nn.Module):
    """Per-channel scale c = c₀ · exp(δ): positive whatever the optimizer does, and weight decay pulls to c₀.

    scale c₀: (d,), positive.
    """

    start: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise AttarError("a channel scale must be finite and positive")
        self.register_buffer("start", scale.detach().float().clone())
        self.log_deviation = nn.Parameter(torch.zeros_like(self.start))

    def matrices(self) -> Matrices:
        return (self.start * self.log_deviation.exp(),)

    def forward(self, x: Tensor, m: Matrices) -> Tensor:
        return wide(x) / m[0]

    def weight_side(self, weight: Tensor, m: Matrices) -> Tensor:
        return wide(weight) * m[0]

    @torch.no_grad()
    def bake(self) -> runtime.ChannelScale:
        return runtime.ChannelScale(self.start.double() * self.log_deviation.double().exp())


# --------------------------------------------------------------------------------------------- rotation


class _Cayley(torch.autograd.Function):
    """p (…, l, l) → (I − K)(I + K)^{-1} = 2 (I + K)^{-1} − I with K = (A − Aᵀ)/2, A = tril(p, −1)."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        half = parameter.tril(-1).mul_(0.5)
        matrix = half - half.mT
        matrix.diagonal(dim1=-2, dim2=-1).fill_(1)
        # No singular value of I + K is below 1, so the unchecked inverse (no device sync) is safe.
        inverse = torch.linalg.inv_ex(matrix)[0]
        ctx.save_for_backward(inverse)
        rotation = inverse * 2
        rotation.diagonal(dim1=-2, dim2=-1).sub_(1)
        return rotation

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        grad_skew = inverse.mT @ grad @ inverse.mT  # −½ ∂L/∂K
        return (grad_skew.mT - grad_skew).tril(-1)


def cayley(parameter: Tensor) -> Tensor:
    """Orthogonal matrices (…, l, l) from free parameters (…, l, l); only their strict lower triangle counts.

    Zero gives the identity; an entry p turns its plane by about p radians, the scaling of PyTorch's own
    Cayley parametrisation, and so of FlatQuant's learning rates.
    """
    if parameter.shape[-1] <= LARGEST_CAYLEY and compiled_for(parameter):
        return CayleyMatrices.apply(parameter)
    return _Cayley.apply(parameter)


def kronecker_factors(d: int) -> tuple[int, int]:
    """(l, r) with l·r = d, l ≤ r as close as possible: 1920 → (40, 48), 3072 → (48, 64)."""
    left = next(k for k in range(math.isqrt(d), 0, -1) if d % k == 0)
    return left, d // left


def check_rotation(d: int, kind: str) -> None:
    """Raises AttarError if no rotation of this kind (see `TransformSettings`) has the width d."""
    if kind == "kronecker" and d > 3 and kronecker_factors(d)[0] == 1:
        raise AttarError(f"a width of {d} has no two factors", fix="Use another rotation")
    if kind in ("hadamard", "adaptive") and d % 2:
        raise AttarError(f"no Hadamard rotation has the odd width {d}", fix="Use another rotation")


def rotation_start(size: int, init: str, generator: torch.Generator | None = None) -> Tensor:
    """Orthogonal matrix (size, size), float64, from which a learned rotation starts.

    init: "identity", "random_orthogonal", "hadamard" (with random signs), or "auto": Hadamard where one of
    this size can be built and random orthogonal elsewhere. Raises AttarError for any other.
    """
    if init == "auto":
        init = "hadamard" if base_order(size) is not None else "random_orthogonal"
    if init == "identity":
        return torch.eye(size, dtype=torch.float64)
    if init == "random_orthogonal":
        q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        return q * r.diagonal().sign()
    if init == "hadamard":
        if base_order(size) is None:
            raise AttarError(f"no Hadamard matrix of order {size}", fix="Use auto or random_orthogonal")
        if size == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        return runtime.Hadamard.random(size, generator)(torch.eye(size, dtype=torch.float64))
    raise AttarError(
        f"unknown start {init!r} of a rotation", fix="Use auto, hadamard, random_orthogonal or identity"
    )


class LearnedKronecker(nn.Module):
    """R = R1 ⊗ R2 with l·r = d: n·d·(l + r) multiplications instead of n·d² (FlatQuant).

    Orthogonal (default): each factor is Cayley(p) · start. Affine: each factor is U diag(s) Vᵀ with
    U = Cayley(p_u) · start, V = Cayley(p_v) and s = exp(log_values), all ones at first.
    `init` names the start, see `rotation_start`. Raises AttarError when d is a prime (no two factors).
    """

    def __init__(
        self, d: int, affine: bool = False, init: str = "auto", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_rotation(d, "kronecker")
        self.sizes = kronecker_factors(d)
        self.affine = affine
        for side, size in zip(("left", "right"), self.sizes, strict=True):
            # In float64, cast where it is used: a float32 start is only orthogonal to 1e-7.
            self.register_buffer(f"{side}_start", rotation_start(size, init, generator))
            self.register_parameter(f"{side}_skew", nn.Parameter(torch.zeros(1 + affine, size, size)))
            if affine:
                self.register_parameter(f"{side}_log_values", nn.Parameter(torch.zeros(size)))

    def _factors(self, side: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """One factor and its inverse transpose."""
        skew, start = getattr(self, f"{side}_skew"), getattr(self, f"{side}_start")
        rotations = cayley(skew.to(dtype or skew.dtype))
        u = rotations[0] @ start.to(rotations.dtype)
        if not self.affine:
            return u, u
        values = getattr(self, f"{side}_log_values").to(rotations.dtype)
        v = rotations[1].mT
        return (u * values.exp()) @ v, (u * (-values).exp()) @ v

    def matrices(self) -> Matrices:
        (left, left_inverse), (right, right_inverse) = self._factors("left"), self._factors("right")
        return left, right, left_inverse, right_inverse

    def forward(self, x: Tensor, m: Matrices) -> Tensor:
        return apply_kronecker(wide(x), m[0], m[1])

    def weight_side(self, weight: Tensor, m: Matrices) -> Tensor:
        return apply_kronecker(wide(weight), m[2], m[3])

    @torch.no_grad()
    def bake(self) -> runtime.Kronecker:
        return runtime.Kronecker(*(self._factors(side, torch.float64)[0] for side in ("left", "right")))


def apply_kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (left ⊗ right): (..., l·r) -> (..., l·r)."""
    if compiled_for(x, left, right):
        return KroneckerRows.apply(x, left, right)
    y = x.reshape(-1, left.shape[0], right.shape[0]) @ right  # (n, l, r)
    return (left.mT @ y).reshape(x.shape)


class LearnedOrthogonal(nn.Module):
    """A full d×d rotation Cayley(p) · start: one d×d inverse at each step, so for small widths only."""

    start: Tensor

    def __init__(self, d: int, init: str = "auto", generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.register_buffer("start", rotation_start(d, init, generator))  # float64
        self.skew = nn.Parameter(torch.zeros(d, d))

    def matrices(self) -> Matrices:
        return (cayley(self.skew) @ self.start.to(self.skew.dtype),)

    def forward(self, x: Tensor, m: Matrices) -> Tensor:
        return wide(x) @ m[0]

    def weight_side(self, weight: Tensor, m: Matrices) -> Tensor:
        return wide(weight) @ m[0]

    @torch.no_grad()
    def bake(self) -> runtime.Dense:
        return runtime.Dense(cayley(self.skew.double()) @ self.start.double())


class FixedRotation(nn.Module):
    """A run-time transform that is not trained."""

    def __init__(self, rotation: runtime.Transform) -> None:
        super().__init__()
        self.rotation = rotation

    def matrices(self) -> Matrices:
        return ()

    def forward(self, x: Tensor, m: Matrices) -> Tensor:
        return self.rotation(x)

    def weight_side(self, weight: Tensor, m: Matrices) -> Tensor:
        return self.rotation.weight_side(weight, wide(weight).dtype)

    @torch.no_grad()
    def bake(self) -> runtime.Transform:
        return copy.deepcopy(self.rotation)


class FixedHadamard(FixedRotation):
    """A random Hadamard rotation: the cheapest one, and the control for a trained one."""

    def __init__(self, d: int, generator: torch.Generator | None = None) -> None:
        super().__init__(runtime.Hadamard.random(d, generator))
