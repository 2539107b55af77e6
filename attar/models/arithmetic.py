"""The arithmetic of a model's blocks while they are calibrated: float32, or products and attention in bfloat16."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.models.block import BlockCall, run_block
from attar.models.tree import map_tensors
from attar.models.weights import weights_of

PRECISIONS = ("float32", "bfloat16")


class Arithmetic:
    """How calls of a model and of its blocks compute.

    bfloat16 is torch's autocast: products, convolutions and attention take bfloat16 and add up in float32; what else
    does, torch says for each kind of device. Rounding, transforms and statistics leave it (`runtime.autocast`), so that
    codes are those of float32 inputs. Whatever computes, results are float32.
    """

    def __init__(self, precision: str, device: torch.device | str) -> None:
        """precision: one of `PRECISIONS`, else an AttarError. device: of the tensors."""
        if precision not in PRECISIONS:
            raise AttarError(f"unknown precision {precision!r}", fix=f"Use one of {', '.join(PRECISIONS)}")
        self.precision, self.device = precision, torch.device(device)

    @classmethod
    def of(cls, model: nn.Module, precision: str | None = None) -> Arithmetic:
        """precision: None takes bfloat16 for a model that is held in 16 bits on a GPU that computes in it, else
        float32."""
        device = weights_of(model).device
        # a model in 16 bits may keep some parameters in float32: of Wan the first one is such
        small = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            small = False
        return cls(precision or default_precision(device.type, small), device)

    @property
    def evidence(self) -> dict[str, str]:
        """{"precision": …}, for what it made: a job may go on on another device. What does not say was float32."""
        return {} if self.precision == "float32" else {"precision": self.precision}

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, whatever is called computes so."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        # a parameter that is cast once for all its uses would add up their gradients in bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def run(self, block: nn.Module, call: BlockCall, outputs: tuple[str | None, ...]) -> dict[str, Tensor]:
        """`run_block` on that device; streams of float32."""
        with self():
            streams = run_block(block, call.to(self.device), outputs)
        return {name: stream.float() for name, stream in streams.items()}

    def bound(self, module: nn.Module) -> Callable[..., Any]:
        """The module as a function that computes so, its results float32."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self():
                results = module(*args, **kwargs)
            return map_tensors(results, lambda t: t.float() if t.is_floating_point() else t)

        return run


def default_precision(device: str, small: bool) -> str:
    """Where nothing else is asked for. device: its kind. small: whether the model is held in 16 bits."""
    return "bfloat16" if device == "cuda" and small else "float32"
