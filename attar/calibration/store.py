"""Traced generations on disk: one safetensors file for each prompt.

Inside a file each distinct tensor is kept once, under the hash of its content: text embeddings that stay the
same over all steps, and call inputs that are the latents themselves, cost nothing more. The hash also proves,
when a tensor is read, that it is what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attar.errors import AttarError
from attar.files import writing
from attar.models.tree import flatten, unflatten

FORMAT = "attar-trace-1"


class TensorPool:
    """Distinct tensors by the hash of their content, on the CPU."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._last: dict[str, tuple[Tensor, int | None, str]] = {}

    def put(self, path: str, tensor: Tensor) -> str:
        """Keeps the tensor and returns its key. The same object at the same path is not copied again."""
        version = None if tensor.is_inference() else tensor._version
        last = self._last.get(path)
        if last is not None and last[0] is tensor and last[1] == version is not None:
            return last[2]
        kept = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        key = content_key(kept)
        self.tensors.setdefault(key, kept)
        self._last[path] = (tensor, version, key)
        return key


def content_key(tensor: Tensor) -> str:
    """Hash of a contiguous CPU tensor's type, shape and bytes."""
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class PromptRecord:
    """Collects the trace of one prompt while it is generated."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self.pool = TensorPool()
        self.latents: list[str] = []  # keys of x_0 (noise) ... x_T
        self.steps: list[dict[str, Any]] = []  # {"timestep": t, "calls": [{"component", "kwargs"}]}
        self.final: str | None = None
        self._calls: list[dict[str, Any]] = []

    def add_call(self, component: str, kwargs: Mapping[str, Any]) -> None:
        """A transformer call of the step that runs now."""
        branch = len(self._calls)
        spec = flatten(dict(kwargs), f"{component}.{branch}", self.pool.put)
        self._calls.append({"component": component, "kwargs": spec})

    def add_latents(self, latents: Tensor) -> None:
        self.latents.append(self.pool.put("latents", latents))

    def end_step(self, timestep: float, latents: Tensor) -> None:
        """The step is done and gave `latents`."""
        self.steps.append({"timestep": timestep, "calls": self._calls})
        self._calls = []
        self.add_latents(latents)

    def end(self, final: Tensor) -> None:
        """The pipeline's own last word: its output before decoding."""
        self.final = self.pool.put("final", final)


class TraceStore:
    """A folder of traced prompts, `prompt-0000.safetensors`, ... Files appear whole or not at all."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._open: dict[int, tuple[dict[str, Any], Any]] = {}

    def path(self, prompt: int) -> Path:
        return self.folder / f"prompt-{prompt:04d}.safetensors"

    def save_prompt(self, prompt: int, record: PromptRecord) -> None:
        """Writes the trace of one prompt, atomically. Raises AttarError for a record that is not finished, and when
        the file cannot be written."""
        if record.final is None or len(record.latents) != len(record.steps) + 1 or not record.steps:
            raise AttarError("the trace of the prompt is not complete", where=f"prompt {prompt}")
        content = {
            "settings": record.settings,
            "latents": record.latents,
            "steps": record.steps,
            "final": record.final,
        }
        text = json.dumps(content)
        # one entry, since safetensors writes several in a random order, and equal traces must be equal files
        metadata = {FORMAT: json.dumps({"hash": _text_hash(text), "trace": text})}
        with writing(self.path(prompt)) as temporary:
            save_file(record.pool.tensors, temporary, metadata=metadata)
        self._open.pop(prompt, None)

    def prompts_done(self) -> list[int]:
        """The prompts whose traces are complete. Raises AttarError if one of the files is damaged."""
        names = [p.stem.removeprefix("prompt-") for p in self.folder.glob("prompt-*.safetensors")]
        done = sorted(int(name) for name in names if name.isdigit())
        for prompt in done:
            self._content(prompt)
        return done

    def settings(self, prompt: int) -> dict[str, Any]:
        """What the prompt was generated with: prompt text, seed, steps, guidance scale, other arguments."""
        return self._content(prompt)["settings"]

    def steps(self, prompt: int) -> int:
        return len(self._content(prompt)["steps"])

    def latents(self, prompt: int) -> tuple[Tensor, Tensor]:
        """(x, timesteps): x (T+1, *shape of the pipeline's latents, batch included), where x[t] enters step t
        and x[t+1] leaves it; timesteps (T,) float64."""
        content = self._content(prompt)
        x = torch.stack([self._tensor(prompt, key) for key in content["latents"]])
        return x, torch.tensor([step["timestep"] for step in content["steps"]], dtype=torch.float64)

    def final_latents(self, prompt: int) -> Tensor:
        """The pipeline's output before decoding."""
        return self._tensor(prompt, self._content(prompt)["final"])

    def components(self, prompt: int, step: int) -> list[str]:
        """The transformer components called at that step, each once ("transformer", "transformer_2")."""
        calls = self._content(prompt)["steps"][step]["calls"]
        return list(dict.fromkeys(call["component"] for call in calls))

    def steps_of(self, component: str, prompt: int) -> list[int]:
        """The steps of a prompt in which a component ran."""
        return [step for step in range(self.steps(prompt)) if component in self.components(prompt, step)]

    def calls(self, component: str, prompt: int, step: int) -> list[dict[str, Any]]:
        """Keyword arguments of that component's calls at that step, on the CPU: one for each call that the
        pipeline made, so one for each guidance branch (or one with a doubled batch). [] if it did not run."""
        return [
            unflatten(call["kwargs"], lambda key: self._tensor(prompt, key))
            for call in self._content(prompt)["steps"][step]["calls"]
            if call["component"] == component
        ]

    def _content(self, prompt: int) -> dict[str, Any]:
        if prompt not in self._open:
            path = self.path(prompt)
            if not path.is_file():
                raise AttarError("the prompt has not been traced", where=str(path))
            try:
                file = safe_open(path, "pt")
                stored = (file.metadata() or {}).get(FORMAT)
                header = None if stored is None else json.loads(stored)
            except (SafetensorError, OSError, ValueError) as error:
                raise _damaged(path, str(error)) from error
            if header is None:
                raise AttarError("not a trace that this version can read", where=str(path))
            if header.get("hash") != _text_hash(header.get("trace", "")):
                raise _damaged(path, "its description does not match its checksum")
            self._open[prompt] = (json.loads(header["trace"]), file)
        return self._open[prompt][0]

    def _tensor(self, prompt: int, key: str) -> Tensor:
        self._content(prompt)
        try:
            tensor = self._open[prompt][1].get_tensor(key)
        except SafetensorError as error:
            raise _damaged(self.path(prompt), str(error)) from error
        if content_key(tensor) != key:
            raise _damaged(self.path(prompt), f"tensor {key} does not match its checksum")
        return tensor


def _text_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _damaged(path: Path, why: str) -> AttarError:
    return AttarError(f"the trace file is damaged: {why}", where=str(path), fix="Delete it and trace again")
