"""Every traced step of a transformer as a sample for training it whole, with what the original gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from attar.calibration.store import TraceStore
from attar.errors import AttarError
from attar.models.block import BlockCall, bind
from attar.progress import Progress
from attar.samples import group_of, one_batch, traced_groups
from attar.workspace import Workspace

OUTPUT = "sample"


class TracedSteps(Sequence[tuple[BlockCall, dict[str, Tensor]]]):
    """Every traced step of a component: its call, all guidance branches in one batch, and what the original gave.

    Branches whose shapes differ (texts of unequal length) are samples of their own.

    Outputs are computed once and kept in the workspace, one file for a prompt; both are read when they are asked for.
    streams: what `compute` is given for each call, the model's output and perhaps those of some layers.
    Raises AttarError when the component did not run at all.
    """

    def __init__(
        self,
        name: str,
        transformer: nn.Module,
        store: TraceStore,
        prompts: int,
        workspace: Workspace,
        streams: Sequence[str] = (OUTPUT,),
    ) -> None:
        self.name, self.transformer, self.store, self.workspace = name, transformer, store, workspace
        self.streams, self.prompts = streams, prompts
        ran = [(p, s) for p in range(prompts) for s in store.steps_of(name, p)]
        if not ran:
            raise AttarError("the component did not run in any traced step", where=name)
        first = {p: s for p, s in reversed(ran)}
        parts = {p: len(self._branches(p, s)) for p, s in first.items()}  # the same in all steps of a prompt
        self.places = [(p, s, part) for p, s in ran for part in range(parts[p])]
        self._files: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> tuple[BlockCall, dict[str, Tensor]]:
        prompt, step, part = self.places[index]
        if prompt not in self._files:
            file = self._file(prompt)
            if self.workspace.read_tensors(file) is None:
                raise AttarError("the original's outputs are missing", where=file, fix="Run again")
            self._files[prompt] = safe_open(self.workspace.folder / file, "pt")
        file = self._files[prompt]
        target = {name: file.get_tensor(f"{step}.{part}.{name}") for name in self.streams}
        return self.call(prompt, step, part), target

    def call(self, prompt: int, step: int, part: int = 0) -> BlockCall:
        """The component's call at that step, with all its branches, or with one of those that fit no batch."""
        return self._branches(prompt, step)[part]

    def _branches(self, prompt: int, step: int) -> list[BlockCall]:
        branches = []
        for arguments in self.store.calls(self.name, prompt, step):
            bound: dict[str, Any] = bind(self.transformer, (), arguments) | {"return_dict": False}
            name = next(iter(bound))  # what is denoised: "hidden_states", or "sample" of a U-Net
            stream = {name: bound.pop(name)}
            time = bound.get("timestep")
            if isinstance(time, Tensor) and not time.ndim:  # a U-Net's, one for all; a batch may hold several
                bound["timestep"] = time.expand(len(stream[name]))
            branches.append(BlockCall(stream, bound).to(dtype=torch.float32))
        return one_batch(branches)

    def groups(self, count: int) -> Any:
        """`count` groups of the traced steps."""
        return traced_groups(self.store, self.name, self.prompts, count)[0]

    def members(self, groups: Any) -> list[int]:
        """The group of steps that each sample is of. All prompts have the same timesteps."""
        known: dict[int, int] = {}
        for prompt, step, _ in self.places:
            if step not in known:
                known[step] = group_of(self.store.calls(self.name, prompt, step), groups) or 0
        return [known[step] for _, step, _ in self.places]

    def compute(
        self, run: Callable[[BlockCall], dict[str, Tensor]], batch_size: int, progress: Progress
    ) -> None:
        """The original's outputs that are not there yet. run: the original on one call.

        batch_size: how many calls of a prompt go through it at once, where their shapes allow it.
        """
        prompts = list(dict.fromkeys(prompt for prompt, _, _ in self.places))
        with progress.task(f"{self.name}: outputs of the original", len(prompts)) as advance:
            for done, prompt in enumerate(prompts):
                if not self.workspace.has(self._file(prompt)):
                    places = [place for place in self.places if place[0] == prompt]
                    outputs: dict[str, Tensor] = {}
                    for start in range(0, len(places), batch_size):
                        some = places[start : start + batch_size]
                        for (_, step, part), streams in zip(some, self._outputs(run, some), strict=True):
                            outputs |= {f"{step}.{part}.{name}": stream for name, stream in streams.items()}
                    self.workspace.write_tensors(self._file(prompt), outputs)
                advance(done + 1, f"prompt {prompt}")

    @torch.no_grad()
    def _outputs(
        self, run: Callable[[BlockCall], dict[str, Tensor]], places: Sequence[tuple[int, int, int]]
    ) -> list[dict[str, Tensor]]:
        """The streams of every place, on the CPU."""
        calls = [self.call(*place) for place in places]
        joined = one_batch(calls)
        if len(joined) == len(calls):
            return [{name: stream.cpu() for name, stream in run(call).items()} for call in calls]
        rows = [len(next(iter(call.streams.values()))) for call in calls]
        parts = {}
        for name, stream in run(joined[0]).items():
            each = len(stream) // sum(rows)  # a layer may see frames, or tokens, as rows of their own
            parts[name] = stream.cpu().split([each * n for n in rows])
        return [{name: part[i].clone() for name, part in parts.items()} for i in range(len(calls))]

    def remove(self) -> None:
        """Deletes the outputs, which nothing needs any more."""
        self._files.clear()
        for prompt in dict.fromkeys(prompt for prompt, _, _ in self.places):
            self.workspace.remove(self._file(prompt))

    def _file(self, prompt: int) -> str:
        return f"{self.name}/outputs-{prompt:04d}.safetensors"
