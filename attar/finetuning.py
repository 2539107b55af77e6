"""The compression of one transformer by training it whole: wrap its linears, train, round, keep everything on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from attar import ranks
from attar.calibration.store import TraceStore
from attar.errors import AttarError
from attar.losses import relative_error
from attar.models.adapter import ModelAdapter
from attar.models.block import BlockCall, as_outputs, bind
from attar.models.weights import ResidentWeights, fill, weights_of
from attar.progress import Progress
from attar.quantize.batching import concatenate_calls
from attar.quantize.block import wrap_linears
from attar.quantize.finetune import Finetuner
from attar.quantize.linear import QuantizedLinear, replace_module
from attar.quantize.plan import LayerPlan, matching
from attar.recipe import Recipe
from attar.settings import block_settings, finetune_settings
from attar.stored import OUTSIDE, block_file, read_layers, restore_block, save_block
from attar.workspace import Workspace

STATE, OUTPUT = "finetune.safetensors", "sample"
SAVE_SECONDS = 120.0
CHECKED = 16  # samples whose error is measured before and after


def check_trainable(components: Mapping[str, nn.Module]) -> None:
    """Raises AttarError where several processes run, or weights are streamed."""
    if ranks.size() > 1:
        raise AttarError(
            "training a whole model runs in one process", where="finetune", fix="Start it without a launcher"
        )
    for name, part in components.items():
        if not isinstance(weights_of(part), ResidentWeights):
            fix = "Add --no-stream, or take another recipe"
            raise AttarError("training a whole model needs its weights in memory", where=name, fix=fix)


class TracedSteps(Sequence[tuple[BlockCall, dict[str, Tensor]]]):
    """Every traced step of a component: its call, all guidance branches in one batch, and what the original gave.

    Outputs are computed once and kept in the workspace, one file for a prompt; both are read when they are asked for.
    """

    def __init__(
        self, name: str, transformer: nn.Module, store: TraceStore, prompts: int, workspace: Workspace
    ) -> None:
        self.name, self.transformer, self.store, self.workspace = name, transformer, store, workspace
        self.places = [
            (p, s) for p in range(prompts) for s in range(store.steps(p)) if name in store.components(p, s)
        ]
        self._files: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> tuple[BlockCall, dict[str, Tensor]]:
        prompt, step = self.places[index]
        if prompt not in self._files:
            file = self._file(prompt)
            if self.workspace.read_tensors(file) is None:
                raise AttarError("the original's outputs are missing", where=file, fix="Run again")
            self._files[prompt] = safe_open(self.workspace.folder / file, "pt")
        return self.call(prompt, step), {OUTPUT: self._files[prompt].get_tensor(str(step))}

    def call(self, prompt: int, step: int) -> BlockCall:
        """The component's call at that step, with all its branches."""
        branches = []
        for arguments in self.store.calls(self.name, prompt, step):
            bound: dict[str, Any] = bind(self.transformer, (), arguments) | {"return_dict": False}
            stream = {"hidden_states": bound.pop("hidden_states")}
            branches.append(BlockCall(stream, bound).to(dtype=torch.float32))
        return concatenate_calls(branches) if len(branches) > 1 else branches[0]

    def compute(self, run: Any, progress: Progress) -> None:
        """The original's outputs that are not there yet. run: the original on one call."""
        prompts = list(dict.fromkeys(p for p, _ in self.places))
        with progress.task(f"{self.name}: outputs of the original", len(prompts)) as advance:
            for done, prompt in enumerate(prompts):
                if not self.workspace.has(self._file(prompt)):
                    steps = [s for p, s in self.places if p == prompt]
                    with torch.no_grad():
                        outputs = {str(s): run(self.call(prompt, s))[OUTPUT] for s in steps}
                    self.workspace.write_tensors(self._file(prompt), outputs)
                advance(done + 1, f"prompt {prompt}")

    def remove(self) -> None:
        """Deletes the outputs, which nothing needs any more."""
        self._files.clear()
        for prompt in dict.fromkeys(p for p, _ in self.places):
            self.workspace.remove(self._file(prompt))

    def _file(self, prompt: int) -> str:
        return f"{self.name}/outputs-{prompt:04d}.safetensors"


class FinetuneJob:
    """Compresses one transformer in place, as `ComponentJob` does, by training it end to end on all traced steps.

    The model is held once, in float32 while it is trained; the original's outputs are computed before its linears are
    wrapped. A killed run goes on from its last state, which is kept every two minutes, to the same result.
    """

    def __init__(
        self,
        name: str,
        transformer: nn.Module,
        plan: list[LayerPlan],
        recipe: Recipe,
        workspace: Workspace,
        store: TraceStore,
        seed: int,
        progress: Progress,
    ) -> None:
        assert recipe.finetune is not None
        self.name, self.transformer, self.recipe = name, transformer, recipe
        self.plan = {p.name: p for p in plan if not p.skipped}
        self.workspace, self.seed, self.progress, self.store = workspace, seed, progress, store
        self.adapter = ModelAdapter.of(transformer)
        self.device = weights_of(transformer).device

    def run(self, prompts: int) -> dict[str, Any]:
        """Compresses the transformer; returns its part of the evidence. prompts: how many were traced."""
        self.transformer.requires_grad_(False).eval()
        files = self._files()
        if not all(self.workspace.has(file) for file in files):
            self._make(prompts)
        results = {}
        for file, (module, _) in files.items():
            results[file] = restore_block(self.workspace, file, module)
            fill(module, partial(read_layers, self.workspace, file)().get, self.device)
        learned = self.workspace.read_json(f"{self.name}/finetune.json")
        return {
            "blocks": [r for file, r in results.items() if not file.endswith(OUTSIDE)],
            "finetune": learned,
        }

    def _make(self, prompts: int) -> None:
        samples = TracedSteps(self.name, self.transformer, self.store, prompts, self.workspace)
        if not samples:
            raise AttarError("the component did not run in any traced step", where=self.name)
        dtypes = {key: t.dtype for key, t in self._tensors()}
        self.transformer.float()
        samples.compute(self._run, self.progress)
        layers = self._wrapped(samples)
        report = self._train(layers, samples)
        for key, tensor in self._tensors():
            if key in dtypes:
                tensor.data = tensor.data.to(dtypes[key])
        self._bake(layers, dtypes)
        self.workspace.write_json(f"{self.name}/finetune.json", report)
        self.workspace.remove(self._state)
        samples.remove()

    def _wrapped(self, samples: TracedSteps) -> dict[str, QuantizedLinear]:
        linears: dict[str, nn.Module] = {name: self.transformer.get_submodule(name) for name in self.plan}
        chosen = [samples.call(*samples.places[i]) for i in _spread(len(samples))]
        settings, seed = block_settings(self.recipe), f"{self.seed}/{self.name}"
        return wrap_linears(self.transformer, self.plan, linears, self._run, chosen, settings, seed)

    def _train(self, layers: dict[str, QuantizedLinear], samples: TracedSteps) -> dict[str, Any]:
        settings, patterns = finetune_settings(self.recipe), self.recipe.finetune.layers  # type: ignore[union-attr]
        chosen = None if patterns is None else matching(self.plan.values(), patterns)
        before = self._error(samples)
        tuner = Finetuner(self._run, samples, layers, settings, f"{self.seed}/{self.name}", chosen)
        known = self.workspace.read_tensors(self._state)
        if known is not None:
            tuner.restore(*known)
        saved = time.monotonic()
        with self.progress.task(f"{self.name}: train", settings.steps) as advance:

            def after(tuner: Finetuner, loss: float) -> None:
                nonlocal saved
                advance(tuner.step, f"loss {loss:.2e}")
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.workspace.write_tensors(self._state, *tuner.state())
                    saved = time.monotonic()

            tuner.train(after)
        for layer in layers.values():
            layer.requires_grad_(False)
            layer.freeze()
        return {
            "steps": settings.steps, "samples": len(samples), "history": tuner.history,
            "error_before": before, "error_after": self._error(samples),
        }  # fmt: skip

    def _bake(self, layers: dict[str, QuantizedLinear], dtypes: dict[str, torch.dtype]) -> None:
        """Blocks go to disk one by one."""
        for file, (_, prefix) in self._files().items():
            inside = [n for n in layers if n.startswith(prefix)] if prefix else list(layers)
            packed = {}
            for name in inside:
                layer = layers.pop(name)
                baked = layer.bake()
                baked.compute_dtype = dtypes[f"{name}.weight"]
                if baked.bias is not None:
                    baked.bias.data = baked.bias.data.to(dtypes[f"{name}.bias"])
                replace_module(self.transformer, name, baked)
                packed[name.removeprefix(prefix)] = baked
            result = dict.fromkeys(
                ("error_before", "error_after", "loss", "rolled_back", "stopped", "attention")
            )
            save_block(self.workspace, file, packed, {"block": prefix.removesuffix("."), **result})

    def _files(self) -> dict[str, tuple[nn.Module, str]]:
        """File -> (module that its layers are in, its prefix); the layers that are in no block last."""
        blocks = self.adapter.blocks
        files = {f"{self.name}/{block_file(b.index)}": (b.module, f"{b.name}.") for b in blocks}
        if any(not name.startswith(tuple(f"{b.name}." for b in blocks)) for name in self.plan):
            files[f"{self.name}/{OUTSIDE}"] = (self.transformer, "")
        return files

    def _run(self, call: BlockCall) -> dict[str, Tensor]:
        call = call.to(self.device)
        return {OUTPUT: as_outputs(self.transformer(**call.streams, **call.constants))[0]}

    @torch.no_grad()
    def _error(self, samples: TracedSteps) -> float:
        """Squared error of the model's output relative to the original's output, mean over some samples."""
        errors = []
        for index in _spread(len(samples)):
            call, target = samples[index]
            zero = {OUTPUT: torch.zeros_like(target[OUTPUT])}
            errors.append(relative_error(self._run(call), target, zero).item())
        return sum(errors) / len(errors)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.transformer.named_parameters(), *self.transformer.named_buffers()]

    @property
    def _state(self) -> str:
        return f"{self.name}/{STATE}"


def _spread(count: int) -> list[int]:
    """Places that are spread evenly over all samples."""
    few = min(CHECKED, count)
    return [int((i + 0.5) / few * count) for i in range(few)]
