"""Block reconstruction: train one block's quantization parameters to reproduce its full-precision output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.errors import AttarError
from attar.quantize.batching import Streams, join, like, to_device
from attar.quantize.unused_rows import keep_unused_rows

Loss = Callable[[Streams, Streams, Any], Tensor]  # (prediction, target, context of the sample) -> scalar
GROUPS = ("transform", "clip", "group_clip", "levels", "branch", "codes", "scales")


@dataclass(frozen=True)
class ReconstructionSettings:
    """Schedule of block reconstruction, S²Q-VDiT's by default (batch size and decay are ours).

    epochs: passes over the calibration set. batch_size: calls of one step, concatenated along the batch axis.
    transform_lr, clip_lr, level_lr, branch_lr, code_lr, scale_lr: AdamW learning rates of scales and rotations, of
    clipping factors, of the parameters of tables, of low-rank branches, of codes in steps, and of the logarithms of
    their scales, which 0 leaves; all fall along a cosine to lr · eta_min_ratio. weight_decay: of the transforms, whose
    parameters are deviations from their start; the others never decay. normalise_loss: divide each loss by its own
    detached value, so that every sample gives a gradient of unit scale (FlatQuant).
    """

    epochs: int = 15
    batch_size: int = 1
    transform_lr: float = 5e-3
    clip_lr: float = 5e-2
    branch_lr: float = 2.5e-4
    eta_min_ratio: float = 1e-3
    weight_decay: float = 0.01
    normalise_loss: bool = False
    level_lr: float = 1e-3
    code_lr: float = 5e-3
    scale_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1:
            raise AttarError(f"epochs={self.epochs} and batch_size={self.batch_size} cannot be trained with")


@dataclass
class ReconstructionResult:
    """What happened. Errors are mean losses over the calibration (validation) set.

    error_before and error_after: at the start and in the state that was kept; after ≤ before always.
    history: mean calibration loss at the end of each epoch. steps: optimizer steps taken. best_epoch: the
    epoch whose state was kept, 0 being the start. rolled_back: an earlier state than the last one was kept.
    stopped: why training ended early, or None.
    """

    error_before: float
    error_after: float
    history: list[float] = field(default_factory=list)
    steps: int = 0
    best_epoch: int = 0
    rolled_back: bool = False
    stopped: str | None = None
    validation_before: float | None = None
    validation_after: float | None = None


def reconstruct_block(
    run: Callable[[Any], Streams],
    calls: Sequence[Any],
    targets: Sequence[Streams],
    groups: Mapping[str, Sequence[nn.Parameter]],
    settings: ReconstructionSettings,
    loss: Loss,
    *,
    contexts: Sequence[Any] | None = None,
    generator: torch.Generator | None = None,
    validation: tuple[Sequence[Any], Sequence[Streams], Sequence[Any] | None] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> ReconstructionResult:
    """Minimises the loss of the quantized block over the calibration set; keeps the best state it met.

    run: the quantized block on one call, giving its output streams. calls, targets: samples and the
    full-precision outputs; contexts: what the loss gets beside them, e.g. token weights (stream → (B, N)),
    or nothing. groups: parameters by what they are (`GROUPS`). generator: of the order of samples (CPU).
    validation: held-out calls, targets and contexts, only measured. progress: called with (epoch, step,
    loss) after every step.

    The mean loss over the calibration set is measured before training and after each epoch, and the state
    with the lowest one is restored at the end, so training never makes the block worse. A loss that is not
    finite ends training with that state. Deterministic for a given generator seed.
    Several processes give their shares of the samples, and take the steps of one that has them all: each passes
    its part of a batch, and the gradients are added up.
    Raises AttarError when the sets do not fit together or the loss is not finite before the first step.
    """
    samples = _samples(calls, targets, contexts)
    held_out = None if validation is None else _samples(*validation)
    unknown = set(groups) - set(GROUPS)
    if unknown:
        fix = f"Use {', '.join(GROUPS)}"
        raise AttarError(f"unknown parameter groups {sorted(unknown)}", fix=fix)
    parameters = [p for group in groups.values() for p in group]
    ranks.same_(parameters)

    before = _mean_loss(run, samples, loss, settings.batch_size)
    if not math.isfinite(before):
        raise AttarError(
            f"the block's error is {before} before training",
            fix="Check the calibration inputs and the channel scales for NaN or overflow",
        )
    result = ReconstructionResult(before, before)
    if held_out is not None:
        result.validation_before = _mean_loss(run, held_out, loss, settings.batch_size)
    best = [p.detach().clone() for p in parameters]
    if parameters and settings.epochs:
        steps = math.ceil(ranks.place(len(samples))[1] / settings.batch_size)
        optimizer, schedule = _optimizer(groups, settings, steps)
        for epoch in range(1, settings.epochs + 1):
            result.stopped = _train_epoch(
                run, samples, optimizer, schedule, settings, loss, generator, epoch, result, progress
            )
            if result.stopped is None:
                error = _mean_loss(run, samples, loss, settings.batch_size)
                result.history.append(error)
                if not math.isfinite(error):
                    result.stopped = f"the error after epoch {epoch} is {error}"
                elif error < result.error_after:
                    result.error_after, result.best_epoch = error, epoch
                    best = [p.detach().clone() for p in parameters]
            if result.stopped is not None:
                break
        result.rolled_back = result.stopped is not None or result.best_epoch < len(result.history)
        if result.rolled_back:
            with torch.no_grad():
                for parameter, value in zip(parameters, best, strict=True):
                    parameter.copy_(value)
        for parameter in parameters:
            parameter.grad = None
    if held_out is not None:
        result.validation_after = _mean_loss(run, held_out, loss, settings.batch_size)
    return result


def _train_epoch(
    run: Callable[[Any], Streams],
    samples: list[tuple[Any, Streams, Any]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    settings: ReconstructionSettings,
    loss: Loss,
    generator: torch.Generator | None,
    epoch: int,
    result: ReconstructionResult,
    progress: Callable[[int, int, float], None] | None,
) -> str | None:
    """One pass over the shuffled samples; why it had to stop, or None."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    start, total = ranks.place(len(samples))
    for batch in _batches(total, settings.batch_size, generator):
        own = [samples[i - start] for i in batch if start <= i < start + len(samples)]
        value = parameters[0].new_zeros(())
        if own:
            value = _loss(run, own, loss) * (len(own) / len(batch))
        whole = ranks.sum_(value.detach().clone())
        number = whole.item()
        if not math.isfinite(number):
            return f"the loss at step {result.steps + 1} (epoch {epoch}) is {number}"
        optimizer.zero_grad(set_to_none=True)
        if own:
            (value / whole if settings.normalise_loss and number > 0 else value).backward()
        ranks.sum_gradients_(parameters)
        optimizer.step()
        schedule.step()
        result.steps += 1
        if progress is not None:
            progress(epoch, result.steps, number)
    return None


@torch.no_grad()
def _mean_loss(
    run: Callable[[Any], Streams], samples: list[tuple[Any, Streams, Any]], loss: Loss, batch_size: int
) -> float:
    total = None
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        value = _loss(run, part, loss).double() * len(part)
        total = value if total is None else total + value
    assert total is not None
    whole, count = ranks.sums(total.item(), len(samples))
    return whole / count


def _loss(run: Callable[[Any], Streams], samples: list[tuple[Any, Streams, Any]], loss: Loss) -> Tensor:
    call, target, context = join(samples)
    prediction = run(call)
    return loss(prediction, like(target, prediction), to_device(context, prediction))


def _optimizer(
    groups: Mapping[str, Sequence[nn.Parameter]], settings: ReconstructionSettings, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    options = {
        "transform": {"lr": settings.transform_lr, "weight_decay": settings.weight_decay},
        "clip": {"lr": settings.clip_lr, "weight_decay": 0.0},
        "group_clip": {"lr": settings.clip_lr, "weight_decay": 0.0},
        "levels": {"lr": settings.level_lr, "weight_decay": 0.0},
        "branch": {"lr": settings.branch_lr, "weight_decay": 0.0},
        "codes": {"lr": settings.code_lr, "weight_decay": 0.0},
        "scales": {"lr": settings.scale_lr, "weight_decay": 0.0},
    }
    optimizer = torch.optim.AdamW(
        [{"params": list(group), **options[name]} for name, group in groups.items() if len(group)], fused=True
    )
    keep_unused_rows(optimizer, groups.get("group_clip", []))
    total, floor = settings.epochs * steps_per_epoch, settings.eta_min_ratio
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: floor + (1 - floor) * (1 + math.cos(math.pi * step / total)) / 2
    )
    return optimizer, cosine


# --------------------------------------------------------------------------------------------- batching


def _samples(
    calls: Sequence[Any], targets: Sequence[Streams], contexts: Sequence[Any] | None
) -> list[tuple[Any, Streams, Any]]:
    if not calls:
        raise AttarError("there are no calibration calls to reconstruct a block with")
    contexts = [None] * len(calls) if contexts is None else contexts
    if not len(calls) == len(targets) == len(contexts):
        sizes = f"{len(calls)} calls, {len(targets)} targets and {len(contexts)} contexts"
        raise AttarError(f"{sizes} do not match")
    return list(zip(calls, targets, contexts, strict=True))


def _batches(count: int, size: int, generator: torch.Generator | None) -> Iterator[list[int]]:
    """The places 0 … count - 1 in a random order, in batches: one of each of `size` equal stretches of the list.

    So processes that hold a stretch each, or several, have equal work in every step.
    """
    stretches = torch.arange(count).tensor_split(size)
    orders = [s[torch.randperm(len(s), generator=generator)].tolist() for s in stretches]
    for k in range(len(orders[0])):
        yield [order[k] for order in orders if k < len(order)]
