"""Hadamard matrices of order K·2^m and the fast transform with them.

K comes from the Paley constructions: I, for a prime q = 3 mod 4, gives K = q + 1 (12, 20, 60, 108, 140 ...);
II, for a prime q = 1 mod 4, gives K = 2(q + 1) (12, 28, 36 ...). They are built here, not kept as tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attar.errors import AttarError

_LARGEST_BASE = 256
_RADIX = 64  # one matmul with a 64 x 64 Sylvester matrix replaces six butterfly passes over memory


def base_order(n: int) -> int | None:
    """Smallest K such that n = K·2^m and a K x K Hadamard matrix can be built; None if there is none."""
    odd = n & -n
    odd = n // odd
    if odd == 1:
        return 1
    order = 4 * odd
    while order <= min(n, _LARGEST_BASE):
        if n % order == 0 and _paley(order) is not None:
            return order
        order *= 2
    return None


def hadamard_base(order: int) -> Tensor:
    """Hadamard matrix (order, order) of ±1, int8, rows orthogonal. Not symmetric in general."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    construction = _paley(order)
    if construction is None:
        raise AttarError(f"no Paley construction gives a Hadamard matrix of order {order}")
    kind, q = construction
    residues = torch.zeros(q, dtype=torch.int64)
    residues[(torch.arange(1, q) ** 2) % q] = 1
    character = 2 * residues - 1
    character[0] = 0
    index = torch.arange(q)
    jacobsthal = character[(index[:, None] - index[None, :]) % q]  # Q_ij = χ(i - j)
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if kind == "I" else 1
    conference[1:, 1:] = jacobsthal
    eye = torch.eye(q + 1, dtype=torch.int64)
    if kind == "I":
        return (eye + conference).to(torch.int8)
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return (torch.kron(conference, plus) + torch.kron(eye, minus)).to(torch.int8)


def sylvester(n: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The symmetric Walsh-Hadamard matrix (n, n) of ±1 for n a power of two."""
    h = torch.ones(1, 1, device=device, dtype=dtype)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return h


def walsh_hadamard(x: Tensor) -> Tensor:
    """Unnormalised Walsh-Hadamard transform of the last axis (a power of two), x (..., 2^m) -> (..., 2^m)."""
    n = x.shape[-1]
    y, stride = x, 1
    while stride < n:
        radix = min(_RADIX, n // stride)
        h = sylvester(radix, x.device, x.dtype)
        y = y.reshape(-1, radix) @ h if stride == 1 else h @ y.reshape(-1, radix, stride)
        stride *= radix
    return y.reshape(x.shape)


def _paley(order: int) -> tuple[str, int] | None:
    if order % 4 == 0:
        if (order - 1) % 4 == 3 and _is_prime(order - 1):
            return "I", order - 1
        if (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
            return "II", order // 2 - 1
    return None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % k for k in range(2, int(q**0.5) + 1))
