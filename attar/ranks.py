"""The processes that work on one job together, each on its share of the prompts and samples.

A launcher starts them (`torchrun`, `accelerate launch`); `joined` brings them together over torch.distributed: gloo
between CPUs, nccl between GPUs. Outside of it, and in a job of one process, everything here is what it is for one:
the share is the whole, sums are what was given, and nothing is sent. A process group that is not ours is left alone.

What the processes decide on has to be the same in all of them, so all call the same functions here in the same order.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attar.errors import AttarError, reason

T = TypeVar("T")

MEETING = timedelta(minutes=10)  # for all processes to appear
# A process that ended is noticed at once. This is for one that is there and silent, as when its machine is lost; the
# others may rightly wait long for it, for example while it generates one prompt more than they.
SILENCE = timedelta(hours=12)
AGAIN = "Run the same command again; it goes on"

_store: Any = None  # what the processes share beside messages, while they are joined


@contextmanager
def joined(device: str | None = None) -> Iterator[None]:
    """Inside, the processes that a launcher has started are one job; without a launcher this does nothing.

    device: where the work is done, None for a GPU where there is one; "cuda" is then the GPU of this process.
    Of an error the process that met it first speaks: it comes out there, the others end silently with exit code 1.
    When one is killed, this is an AttarError in the others. Raises AttarError when they cannot come together.
    """
    global _store
    if _store is not None or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    _store = _meet(device)
    before = signal.signal(signal.SIGTERM, _stopped)  # a launcher ends the others so when one has ended
    try:
        yield
        barrier()  # one of them may keep what they meet over, so they leave together
        dist.destroy_process_group()
    except BaseException:
        if _first_to_fail():
            raise
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        _store = None


def size() -> int:
    """How many processes there are."""
    return 1 if _store is None else dist.get_world_size()


def rank() -> int:
    """Which of them this is, from 0."""
    return 0 if _store is None else dist.get_rank()


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def here() -> int:
    """How many of them share this machine."""
    return 1 if _store is None else int(os.environ.get("LOCAL_WORLD_SIZE", size()))


def mine(items: Sequence[T]) -> Sequence[T]:
    """This process's share: the list is cut into stretches that differ by one at most."""
    each, more = divmod(len(items), size())
    start = rank() * each + min(rank(), more)
    return items[start : start + each + (rank() < more)]


def collected(items: Sequence[T]) -> list[T]:
    """The items of all processes, in the order of the whole list. They are pickled; tensors should be on the CPU."""
    if size() == 1:
        return list(items)
    parts: list[Any] = [None] * size()
    with _together():
        dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def place(count: int) -> tuple[int, int]:
    """(start, total): where the `count` items that this process holds begin in the whole list, and its length."""
    counts = collected([count])
    return sum(counts[: rank()]), sum(counts)


def first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them."""
    if size() == 1:
        return make()
    box = [make() if is_first() else None]
    with _together():
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def barrier() -> None:
    """Goes on when all processes are here."""
    collected([None])


def sums(*numbers: float) -> Sequence[float]:
    """Each number added up over the processes, in float64."""
    return numbers if size() == 1 else sum_(torch.tensor(numbers, dtype=torch.float64)).tolist()


def sum_(tensor: Tensor) -> Tensor:
    """Adds the tensors of all processes up, in place; the bits are the same everywhere."""
    return _reduce_(tensor, dist.ReduceOp.SUM)


def max_(tensor: Tensor) -> Tensor:
    """The largest of the processes' values, element by element, in place."""
    return _reduce_(tensor, dist.ReduceOp.MAX)


def same_(tensors: Sequence[Tensor]) -> None:
    """Gives the tensors the values that they have in the first process."""
    if size() > 1:
        with _together():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)


def sum_gradients_(parameters: Sequence[nn.Parameter]) -> None:
    """Adds up what the backward passes gave, in one message. A parameter that no process has used keeps None."""
    if size() == 1 or not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    used = gradients[0].new_tensor([p.grad is not None for p in parameters])
    flat = sum_(torch.cat([used, *(g.flatten() for g in gradients)]))
    used, *parts = flat.split([len(parameters), *(g.numel() for g in gradients)])
    for parameter, part, count in zip(parameters, parts, used.tolist(), strict=True):
        # fused optimizers take a gradient to lie in memory as its parameter does
        parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter)) if count else None


def _reduce_(tensor: Tensor, operation: Any) -> Tensor:
    if size() > 1:
        with _together():
            dist.all_reduce(tensor, operation)
    return tensor


def _meet(device: str | None) -> Any:
    from torch.distributed.rendezvous import rendezvous

    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    if cuda:
        own, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= there or device not in (None, "cuda"):
            raise AttarError(
                f"every process needs a GPU of its own, and there are {there} here",
                where="--device",
                fix=f"Start at most {there} processes on a machine, with --device cuda, or use --device cpu",
            )
        torch.cuda.set_device(own)
    try:
        store, number, count = next(rendezvous("env://", timeout=MEETING))
        # what is on the CPU goes over gloo also then: objects, counts, and the word of who failed
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=SILENCE)
    except (RuntimeError, ValueError) as error:
        raise AttarError(
            f"the processes of this job cannot reach each other ({reason(error)})",
            fix="Check the launcher's address and port, and GLOO_SOCKET_IFNAME where there are several networks",
        ) from error
    return store


@contextmanager
def _together() -> Iterator[None]:
    """What torch.distributed raises inside means that one of the others is not there any more."""
    try:
        yield
    except RuntimeError as error:
        # gloo puts a place in its source before the words, and advice behind them
        detail = reason(error).rpartition(".cc:")[2].partition("] ")[2].partition(". ")[0] or reason(error)
        raise AttarError(f"another process of this job ended ({detail})", fix=AGAIN) from error


def _first_to_fail() -> bool:
    try:
        return _store.add("failed", 1) == 1
    except RuntimeError:  # launchers keep it; without one it goes with the first process
        return True


def _stopped(*_: Any) -> NoReturn:
    raise AttarError("the job was stopped, or another process of it ended", fix=AGAIN)
