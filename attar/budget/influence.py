"""How much of a block's error reaches the latents, in a denoising step and added up over a trajectory, or what a
decoder makes of latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.models.adapter import evaluating
from attar.models.block import as_outputs
from attar.models.tree import map_tensors
from attar.models.weights import weights_of

Sample = Sequence[Mapping[str, Any]]  # the calls of the model in one denoising step, one for each branch


@contextmanager
def standing_in(block: nn.Module, other: Callable[..., Any]) -> Iterator[None]:
    """Inside, calls of `block` give what `other` gives, which gets and gives float32; the result has the block's types.

    The block runs too, so that whatever opens, closes or moves weights around its calls goes on as ever.
    """

    def instead(_: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> Any:
        own = [part.dtype for part in as_outputs(result) if isinstance(part, Tensor)]
        given = other(*map_tensors(args, _wide), **map_tensors(kwargs, _wide))
        return map_tensors(given, lambda tensor: tensor.to(own[0]) if tensor.is_floating_point() else tensor)

    handle = block.register_forward_hook(instead, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


class Step:
    """One traced denoising step: how an error of the model's outputs reaches the latents that the step gives.

    A scheduler with its guidance is linear in what the model gave, x' = a x + Σ_k c_k out_k over the branches k, for
    most schedulers exactly; a and c are found by least squares, so nothing need be known of either. Errors that both
    branches of a guided step share then cancel to what is left of them, and errors that differ are as large as
    guidance makes them. What steps before gave (schedulers of a higher order) and fresh noise are not told apart from
    the rest, which the fit leaves over.
    """

    def __init__(self, transformer: nn.Module, sample: Sample, before: Tensor, after: Tensor) -> None:
        """before, after: (B, …), the latents that enter the step and those that leave it.

        kept: the share a of the former; coefficients: c of every branch; outputs: what each gave. Raises AttarError
        when the model's outputs do not have the shape of the latents, of twice as many channels (with a variance), or
        of several of them in a batch.
        """
        self.sample, self.shape = sample, before.shape
        self.outputs = self._run(transformer)
        known = torch.stack([before.flatten(), *(part.flatten() for part in self.outputs)], 1).double()
        found = torch.linalg.lstsq(known, after.flatten().double()[:, None]).solution
        self.kept, *self.coefficients = found[:, 0].tolist()

    def change(self, transformer: nn.Module) -> Tensor:
        """(numel,) float64: by how much the latents that leave the step change with what the model gives now."""
        change = torch.zeros(self.shape, dtype=torch.float64)
        for c, now, then in zip(self.coefficients, self._run(transformer), self.outputs, strict=True):
            change += c * (now.double() - then.double())
        return change.flatten()

    def _run(self, transformer: nn.Module) -> list[Tensor]:
        """The output of every branch, in the shape of the latents."""
        calls = [{**call, "return_dict": False} for call in self.sample]
        return [part for call in calls for part in self._branches(_output(transformer, call))]

    def _branches(self, output: Tensor) -> list[Tensor]:
        batch, *rest = self.shape
        if output.ndim == len(self.shape) and output.shape[1] == 2 * self.shape[1]:
            output = output[:, : self.shape[1]]  # the other half is a learned variance
        if not batch or output.shape[0] % batch or list(output.shape[1:]) != rest:
            raise AttarError(
                f"the model gives {tuple(output.shape)} where latents are {tuple(self.shape)}, so its errors "
                "cannot be followed into them",
                where="allocate.objective",
                fix="Let all blocks count alike: --set allocate.objective=block",
            )
        return list(output.split(batch))


class Picture:
    """What a decoder makes of one calibration sample."""

    def __init__(self, decoder: nn.Module, sample: Sample) -> None:
        self.sample = sample
        self.output = self._run(decoder)

    @property
    def size(self) -> float:
        """Its squared length."""
        return self.output.square().sum().item()

    def change(self, decoder: nn.Module) -> Tensor:
        """(numel,) float64: by how much it changes with what the decoder gives now."""
        return (self._run(decoder) - self.output).flatten()

    def _run(self, decoder: nn.Module) -> Tensor:
        return _output(decoder, self.sample[0]).double()


def accumulated(changes: Sequence[Tensor], steps: int) -> float:
    """Squared length of the sum of all steps' changes, from those of some of them, spread evenly over a trajectory.

    Changes that have nothing to do with one another add up as their squares do, changes in one direction as they are:
    with n of T steps known, T/n Σ ‖Δ_i‖² + T(T−1)/(n(n−1)) Σ_{i≠j} ⟨Δ_i, Δ_j⟩, the latter at least 0. What is left out
    is what the model makes of a change in later steps.
    """
    together = torch.stack(list(changes))
    products = together @ together.T
    count, own = len(changes), products.trace().item()
    if count == 1:
        return steps * own
    cross = max(0.0, products.sum().item() - own)
    return steps / count * own + steps * (steps - 1) / (count * (count - 1)) * cross


@dataclass(frozen=True)
class Trajectory:
    """What errors come to in the final latents of a denoising trajectory.

    samples: its steps that this process follows. steps: how many it has. size: squared length of its final latents.
    """

    samples: Sequence[Step]
    steps: int
    size: float

    def error(self, changes: Sequence[Tensor]) -> float:
        """Of the changes of all processes' steps, relative to the final latents."""
        return accumulated(changes, self.steps) / self.size


@dataclass(frozen=True)
class Pictures:
    """What errors come to in what a decoder gives. samples: of this process. size: squared length of all processes'."""

    samples: Sequence[Picture]
    size: float

    def error(self, changes: Sequence[Tensor]) -> float:
        """Of the changes of all processes' pictures, relative to these."""
        return math.fsum(change.square().sum().item() for change in changes) / self.size


def _output(model: nn.Module, call: Mapping[str, Any]) -> Tensor:
    device = weights_of(model).device
    with evaluating(model):
        given = model(**map_tensors(dict(call), lambda t: t.to(device)))
    return as_outputs(given)[0].float().cpu()
