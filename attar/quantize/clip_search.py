"""Clipping that starts where rounding to nearest errs least, found by trying: many shares of each row at once."""

from __future__ import annotations

import torch
from torch import Tensor

from attar.quantize.formats import fake_quantize_weight

SHARES = tuple(1 - 0.02 * i for i in range(36))  # of the largest magnitude of a row: 1.00, 0.98 … 0.30
AT_ONCE = {"cpu": 1 << 20}  # numbers that are rounded together: a few megabytes, which stay in the cache
AT_ONCE_ELSEWHERE = 1 << 25


def searched_clip(
    weight: Tensor,
    start: float,
    bits: int,
    groups: int,
    number: str = "int",
    levels: Tensor | None = None,
) -> Tensor:
    """Logits of clipping factors (f_lo, f_hi), (rows, 2, groups), with which a weight (rows, in) is rounded best.

    Both ends are cut at the same share of the largest magnitude of the row or group, and nowhere farther out than
    σ(start), which is tried first. Where all codes of integers are used, one end has a code more, and is cut that much
    farther out; either end is tried. levels: (1 or rows, 1 or groups, 2^bits) of a table.
    """
    most = 1 << (bits - 1)
    short = (most - 1) / most
    sides = weight.new_tensor([(1.0, short), (short, 1.0)] if number == "full_range" else [(1.0, 1.0)])
    shares = (weight.new_tensor(SHARES).view(-1, 1, 1) * sides).flatten(0, 1)  # (tries - 1, 2)
    tries = 1 + len(shares)
    together = max(1, AT_ONCE.get(weight.device.type, AT_ONCE_ELSEWHERE) // (tries * weight.shape[1]))
    found = []
    for first in range(0, len(weight), together):
        rows = weight[first : first + together]
        own = levels if levels is None or len(levels) == 1 else levels[first : first + len(rows)]
        logits = _tried(rows, start, shares, groups)
        repeated = rows.repeat(tries, 1)
        rounded = fake_quantize_weight(
            repeated,
            bits,
            logits.sigmoid().flatten(1, 2),
            weight.shape[1] // groups,
            number,
            own if own is None or len(own) == 1 else own.repeat(tries, 1, 1),
        )
        errors = (rounded - repeated).square_().unflatten(1, (groups, -1)).sum(-1).view(tries, -1, groups)
        best = errors.argmin(0)  # the first of several
        found.append(logits.gather(1, best.expand(2, 1, -1, -1)).squeeze(1).transpose(0, 1))
    return torch.cat(found)


def _tried(rows: Tensor, start: float, shares: Tensor, groups: int) -> Tensor:
    """Logits (2, tries, rows, groups) for shares (tries - 1, 2) of the largest magnitudes of (rows, in)."""
    grouped = rows.unflatten(1, (groups, -1))
    ends = torch.stack([grouped.amin(-1).neg(), grouped.amax(-1)]).clamp(min=1e-12).unsqueeze(1)
    reach = shares.T[:, :, None, None] * ends.amax(0)
    logits = (reach / ends).clamp(max=0.999).logit().clamp(max=start)
    return torch.cat([torch.full_like(ends, start), logits], 1)
