"""Calibration data made of the statistics that batch normalisation keeps, for models that have it and bring no data.

ZeroQ (arXiv 2001.00281) trains the data themselves, Genie (arXiv 2212.04780) a small generator and its latents. Both
ask that the inputs of all normalisation layers have the means and deviations of what the model was trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attar.calibration.generator import LATENT, Generator
from attar.calibration.swing import swinging
from attar.errors import AttarError
from attar.losses.statistics import statistics_distance
from attar.models.adapter import evaluating

STEPS = {"inputs": 500, "generator": 4000}
PATIENCE, LEAST_RATE = 100, 1e-4  # of the rates that fall on a plateau

Progress = Callable[[int, int, float], None]


def synthesize(
    model: nn.Module,
    shape: Sequence[int],
    count: int,
    *,
    by: str = "inputs",
    run: Callable[[Tensor], Any] | None = None,
    statistics: str = "batch",
    input_statistics: tuple[float, float] | None = (0.0, 1.0),
    batch_size: int = 128,
    steps: int | None = None,
    swing: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Inputs of `model` under which the inputs of its batch normalisation layers have the statistics that these keep.

    Minimises Σ over layers of ‖μ(x) − μ‖² + ‖σ(x) − σ‖² (`statistics_distance`), in batches that are made one after
    another. The model is in evaluation mode meanwhile, and afterwards as it was.

    shape: of one input, (C, H, W) or, by "inputs", any other. count: how many. run: calls the model with a batch
    (B, *shape) of its own type; by default `model` itself, which has to hold all that `run` calls.
    by: "inputs" trains the data, which start from a normal distribution, with Adam of rate 0.5 that falls on a plateau
    (ZeroQ, 500 steps). "generator" trains latents of 256 numbers, rate 0.1 that falls on a plateau, and a `Generator`
    for each batch, rate 0.01 and 0.95 times as much every 100 steps (Genie, 4000 steps; its code has the names of the
    two rates exchanged, their use is as here).
    statistics: "batch", of all samples together; "sample", of each alone, as in ZeroQ's code.
    input_statistics: mean and deviation of all channels of the data, which are one more term by "inputs", and which
    the generator's last layer gives to every batch. For an autoencoder's decoder they are those of its latents,
    (shift_factor, 1 / scaling_factor). None is for unknown ones: no such term, and a last layer that is trained.
    steps: of each batch; None for those of the paper. swing: pixels by which strided convolutions swing (`swinging`);
    1 in Genie. seed: of all that is drawn; torch's own generators are left alone.
    progress: called with (steps done, all of them, loss) after every step.

    Returns (count, *shape) in float32 (float64 for a model in that) on the model's device, without gradient.
    Raises AttarError for a model without such layers, for layers that have never been trained or that `run` does not
    reach, for arguments out of range, and where the loss is not finite.
    """
    sizes = _check(shape, count, by, statistics, batch_size, steps)
    layers = statistics_layers(model)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    own = next(iter(layers.values())).running_mean if parameter is None else parameter
    assert own is not None
    kind = torch.promote_types(own.dtype, torch.float32)
    total, done = (STEPS[by] if steps is None else steps), 0
    rng = torch.Generator().manual_seed(seed)
    call = model if run is None else run
    mean, deviation = input_statistics or (0.0, 1.0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=kind).to(own.device)

    found = []
    with _untouched(model), swinging(model, swing, rng), _comparing(layers, statistics == "sample") as terms:
        for size in sizes:
            if by == "inputs":
                make = _Inputs(mean + deviation * draw(size, *shape))
            else:
                make = _Generated(draw(size, LATENT), Generator(shape, rng, input_statistics))
            for _ in range(total):
                data = make.data()
                call(data.to(own.dtype))
                loss = _sum(terms, layers)
                if input_statistics is not None and by == "inputs":
                    loss = loss + _own_distance(data, input_statistics, statistics == "sample")
                make.step(loss)
                done += 1
                if progress is not None:
                    progress(done, total * len(sizes), loss.item())
            found.append(make.data().detach())
    return torch.cat(found)


@torch.no_grad()
def statistics_error(
    model: nn.Module, data: Tensor, *, run: Callable[[Tensor], Any] | None = None, statistics: str = "batch"
) -> float:
    """What `synthesize` minimises, without the term of the inputs, for data (B, ...) that are there already."""
    _one_of("statistics", statistics, ("batch", "sample"))
    layers = statistics_layers(model)
    with evaluating(model), _comparing(layers, statistics == "sample") as terms:
        (model if run is None else run)(data)
        return _sum(terms, layers).item()


def statistics_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The normalisation layers that keep running statistics, by their dotted names.

    Raises AttarError where there is none, and for one whose statistics are not finite or as they were at its birth.
    """
    found = _layers(model)
    if not found:
        raise AttarError(
            "no layer keeps running statistics (batch normalisation), and data cannot be synthesised without",
            where=type(model).__name__,
            fix="Calibrate a denoiser on its own trajectories (attar.compress traces them), others on real inputs",
        )
    for name, layer in found.items():
        mean, variance = layer.running_mean, layer.running_var
        assert mean is not None and variance is not None
        if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            raise AttarError("running statistics are not finite", where=name, fix="Check the model")
        if bool((mean == 0).all() and (variance == 1).all()):
            raise AttarError(
                "running statistics are at their initial values, mean 0 and variance 1: no data ever passed",
                where=name,
                fix="Load the trained weights, buffers included",
            )
    return found


def keeps_statistics(model: nn.Module) -> bool:
    """Whether a normalisation layer of the model keeps running statistics; these may be on the meta device."""
    return bool(_layers(model))


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None and m.running_var is not None
    }


class _Inputs:
    """A batch that is trained itself."""

    def __init__(self, start: Tensor) -> None:
        self.batch = start.requires_grad_()
        self.optimizer = torch.optim.Adam([self.batch], lr=0.5)
        self.plateau = _plateau(self.optimizer)

    def data(self) -> Tensor:
        return self.batch

    def step(self, loss: Tensor) -> None:
        _descend(loss, [self.optimizer])
        self.plateau.step(loss.item())


class _Generated:
    """A batch that a generator makes of latents, both of which are trained."""

    def __init__(self, latents: Tensor, network: Generator) -> None:
        self.latents, self.network = latents.requires_grad_(), network.to(latents)
        self.of_latents = torch.optim.Adam([self.latents], lr=0.1)
        self.of_network = torch.optim.Adam(self.network.parameters(), lr=0.01)
        self.plateau = _plateau(self.of_latents)
        self.decay = torch.optim.lr_scheduler.StepLR(self.of_network, 100, 0.95)

    def data(self) -> Tensor:
        return self.network(self.latents)

    def step(self, loss: Tensor) -> None:
        _descend(loss, [self.of_latents, self.of_network])
        self.plateau.step(loss.item())
        self.decay.step()


def _plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=PATIENCE, min_lr=LEAST_RATE)


def _descend(loss: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    if not bool(torch.isfinite(loss)):
        raise AttarError(
            f"the statistics of synthesised data are {loss.item()} away from the model's",
            fix="Check the model for values that overflow its type, or use float32",
        )
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def _own_distance(data: Tensor, target: tuple[float, float], per_sample: bool) -> Tensor:
    mean, deviation = (data.new_full((data.shape[1],), value) for value in target)
    return statistics_distance(data, mean, deviation.square(), per_sample)


@contextmanager
def _comparing(layers: Mapping[str, _BatchNorm], per_sample: bool) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, each call of a layer leaves the distance of its input's statistics under the layer's name."""
    terms: dict[str, list[Tensor]] = {name: [] for name in layers}

    def compare(name: str) -> Any:
        def see(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            mean, variance = layer.running_mean, layer.running_var
            terms[name].append(statistics_distance(args[0], mean, variance, per_sample))  # type: ignore[arg-type]

        return see

    handles = [layer.register_forward_pre_hook(compare(name)) for name, layer in layers.items()]
    try:
        yield terms
    finally:
        for handle in handles:
            handle.remove()


def _sum(terms: dict[str, list[Tensor]], layers: Mapping[str, nn.Module]) -> Tensor:
    """Of one forward, whose terms are taken away."""
    missing = [name for name in layers if not terms[name]]
    if missing:
        raise AttarError(
            f"{len(missing)} normalisation layers are not reached by a run of the model",
            where=missing[0],
            fix="Give the part of the model that runs, such as an autoencoder's decoder",
        )
    loss = torch.stack([value for name in layers for value in terms[name]]).sum()
    for found in terms.values():
        found.clear()
    return loss


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and gradients to the inputs alone; what was before comes back."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def _check(
    shape: Sequence[int], count: int, by: str, statistics: str, batch_size: int, steps: int | None
) -> list[int]:
    """Raises AttarError for what cannot be done; the sizes of the batches, as equal as they can be."""
    _one_of("by", by, tuple(STEPS))
    _one_of("statistics", statistics, ("batch", "sample"))
    if not len(shape) or min(shape) < 1 or count < 1 or batch_size < 1 or (steps is not None and steps < 1):
        raise AttarError(
            f"cannot synthesise {count} inputs of shape {tuple(shape)} in batches of {batch_size} with {steps} steps"
        )
    if by == "generator" and len(shape) != 3:
        raise AttarError(
            f"the generator makes images (C, H, W), not {tuple(shape)}",
            fix='Use by="inputs" for other shapes',
        )
    sizes = batch_sizes(count, batch_size)
    if by == "generator" and min(sizes) < 2:
        raise AttarError(
            "the generator normalises over a batch, and one input is none", fix="Ask for two or more"
        )
    return sizes


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """Of as few batches as hold so many inputs, as equal as they can be, the largest first."""
    return [len(part) for part in torch.arange(count).tensor_split(-(-count // batch_size))]


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise AttarError(f"unknown {name} {value!r}", fix=f"Use one of {', '.join(known)}")
