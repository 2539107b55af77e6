"""One resumable optimisation: AdamW or Muon, an averaged copy of the weights, a state file without pickle.

Under `torchrun` the processes train one model together: each draws its own samples, gradients are averaged, and the
first process keeps the clock and the state file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from attar.files import writing


class Trainer:
    """Trains the parameters of some modules within a budget of minutes, over any number of runs.

    The learning rate warms up over the first 2 % of the budget, stays, and falls linearly to zero over the last 40 %.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        rate: float,
        minutes: float,
        state: Path,
        muon_rate: float | None = None,
    ) -> None:
        self.parameters = [p for m in modules for p in m.parameters()]
        # running statistics of batch norms are part of what is trained
        self.buffers = [
            m.get_buffer(name) for m in modules for name in m.state_dict() if name in dict(m.named_buffers())
        ]
        matrices = [p for p in self.parameters if p.ndim == 2 and min(p.shape) >= 64] if muon_rate else []
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        ]
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.01))
        self.peaks = [rate, muon_rate]
        self.average = [p.detach().clone() for p in self.parameters]
        self.minutes, self.state, self.step, self.used = minutes, state, 0, 0.0
        self.curve: list[list[float]] = []  # [step, loss]
        if state.is_file():
            self._load()
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        if distributed.is_initialized():
            torch.manual_seed(1009 * self.step + self.rank)  # samples of its own

    def steps(self) -> Iterator[int]:
        """Step numbers until the budget is used. Saves the state every two minutes and at the end."""
        clock = saved = self._clock()
        while self.used < 60 * self.minutes:
            yield self.step
            self.step += 1
            now = self._clock()
            self.used += min(now - clock, 30.0)  # a machine that slept does not use up the budget
            clock = now
            if distributed.is_initialized():
                used = torch.tensor([self.used], dtype=torch.float64)
                distributed.broadcast(used, 0)
                self.used = used.item()
            if now - saved > 120 and self.rank == 0:
                self._save()
                saved = now
        if self.rank == 0:
            self._save()

    def _clock(self) -> float:
        """Seconds; on a CPU those that it worked for one thread, so that other jobs do not use up the budget."""
        if self.parameters[0].device.type == "cpu":
            return time.process_time() / torch.get_num_threads()
        return time.time()

    @property
    def progress(self) -> float:
        return self.used / (60 * self.minutes)

    def note(self, loss: float) -> None:
        """A point of the training curve, which is kept with the state."""
        self.curve.append([self.step, round(loss, 5)])

    def update(self, loss: Tensor) -> float:
        factor = min(1.0, self.progress / 0.02 + 0.01, (1 - self.progress) / 0.4)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * max(factor, 0.0)
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if distributed.is_initialized():
            self._average_gradients()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        decay = min(0.998, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return loss.item()

    def _average_gradients(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]) / distributed.get_world_size()
        distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def use_average(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)

    def _slots(self) -> Iterator[tuple[str, Tensor, Callable[[Tensor], None]]]:
        """Every tensor of the state with its name and a setter."""
        for i, (p, a) in enumerate(zip(self.parameters, self.average, strict=True)):
            yield f"{i}.weight", p.data, p.data.copy_
            yield f"{i}.average", a, a.copy_
        for i, b in enumerate(self.buffers):
            yield f"buffer.{i}", b, b.copy_

    def _save(self) -> None:
        tensors = {name: tensor.contiguous() for name, tensor, _ in self._slots()}
        for i, p in enumerate(self.parameters):
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(p, {}).items():
                    tensors[f"{i}.optimizer.{key}"] = value.reshape(value.shape).contiguous().float()
        tensors["rng"] = torch.get_rng_state()
        with writing(self.state) as temporary:
            known = {"step": str(self.step), "used": repr(self.used), "curve": json.dumps(self.curve)}
            save_file(tensors, temporary, metadata=known)

    def _load(self) -> None:
        with safe_open(self.state, framework="pt") as file:
            meta = file.metadata()
            self.step, self.used = int(meta["step"]), float(meta["used"])
            self.curve = json.loads(meta["curve"])
            with torch.no_grad():
                for name, _, put in self._slots():
                    put(file.get_tensor(name))
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if ".optimizer." in name:
                    index, _, key = name.split(".")
                    parameter = self.parameters[int(index)]
                    owner = next(
                        o for o in self.optimizers if any(p is parameter for p in o.param_groups[0]["params"])
                    )
                    owner.state[parameter][key] = file.get_tensor(name)
            torch.set_rng_state(file.get_tensor("rng"))
