"""What packed linears could reach here: the rate of a large integer product over that of a floating-point one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from attar.bench.timing import faster, interleave
from attar.runtime.random_layer import random_layer

ROWS, WIDTH, OUT = 1024, 1536, 12288  # so many outputs that quantizing the input does not count


def measure_limit(
    dtype: torch.dtype, rounds: int, device: torch.device | str = "cpu", bits: tuple[int, int] = (8, 8)
) -> dict[str, Any]:
    """Operations per second of both products, in turns, and their ratio. bits: of weights and activations, of which few
    are faster on some processors. No transforms."""
    x = torch.randn(ROWS, WIDTH).to(device=device, dtype=dtype)
    weight = torch.randn(OUT, WIDTH).to(device=device, dtype=dtype)
    packed = random_layer(WIDTH, OUT, *bits, dtype).to(device)
    seconds = interleave({"dense": lambda: F.linear(x, weight), "packed": lambda: packed(x)}, rounds, device)
    operations = 2.0 * ROWS * WIDTH * OUT
    return {
        "bits": list(bits),
        **{f"{name}_rate": operations / sorted(values)[len(values) // 2] for name, values in seconds.items()},
        "faster": faster(seconds["dense"], seconds["packed"]).to_json(),
    }
