"""Small pieces that the training of every built-in model uses."""

from __future__ import annotations

import time

import torch
from torch import Tensor, distributed, nn

from attar.models.zoo.canvas import BACKGROUND


def log(message: str) -> None:
    if distributed.is_initialized() and distributed.get_rank() > 0:
        return
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def autocast(device: torch.device):
    return torch.autocast(device.type, dtype=torch.bfloat16)


def ink_weighted_error(out: Tensor, x: Tensor, squared: float = 1.0) -> Tensor:
    """Absolute plus `squared` times squared error of clips (B, 3, F, H, W) in [-1, 1]; ink counts four times."""
    ground = torch.tensor(BACKGROUND, device=x.device)[None, :, None, None, None] * 2 - 1
    weight = 1 + 3 * ((x - ground).abs().amax(dim=1, keepdim=True) > 0.1)
    error = (out - x) * weight
    return error.abs().mean() + squared * (error * (out - x)).mean()


def round_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep float32 modules, but with weights that the stored dtype can hold, so that scores are those of the file."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype).to(tensor.dtype))
    return module
