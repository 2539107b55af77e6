"""The compression of one transformer by training it whole, from the start or behind a calibration block by block."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attar import ranks
from attar.component import ComponentJob
from attar.errors import AttarError, out_of_memory
from attar.job import Job
from attar.losses import mse, mse_with_layers, relative_error
from attar.models.block import BlockCall, as_outputs
from attar.models.types import give_types, tensors_of, types_kept, types_of
from attar.models.weights import ResidentWeights, fill, weights_of
from attar.quantize.batching import like
from attar.quantize.finetune import Finetuner, Layer
from attar.quantize.linear import QuantizedLinear, replace_module
from attar.quantize.plan import LayerPlan, matching, open_planned
from attar.quantize.polish import ScaledCodes
from attar.quantize.recompute import checkpointed
from attar.quantize.relations import FEATURES, RelationTerm, draw_memory, windows
from attar.quantize.wrap import input_facts, wrap_linears
from attar.recipe import Recipe
from attar.runtime.layers import PackedLinear, packed_layers
from attar.runtime.step_groups import ARGUMENT, StepGroups, choose_group, follow_steps
from attar.settings import block_settings, finetune_settings, has_groups, relation_settings
from attar.stored import OUTSIDE, block_file, read_layers, read_result, restore_block, save_block
from attar.traced import OUTPUT, TracedSteps

SAVE_SECONDS = 120.0
CHECKED = 16  # samples whose error is measured before and after


def check_trainable(
    components: Mapping[str, nn.Module], plans: Mapping[str, list[LayerPlan]], recipe: Recipe
) -> None:
    """Raises AttarError where the recipe trains the whole model and several processes run, weights are streamed,
    layers are chosen that there are not, or clipping factors alone that are off."""
    if recipe.finetune is None:
        return
    told = recipe.finetune
    others = (
        told.weight_lr,
        told.bias_lr,
        told.adapter_rank,
        told.auxiliary_rank,
        told.level_lr,
        told.scale_lr,
    )
    if told.clip_lr and not any(others) and not (recipe.quantize.weight_clip or recipe.quantize.act_clip):
        raise AttarError(
            "nothing is trained: there are no clipping factors",
            where="finetune.clip_lr",
            fix="Set quantize.weight_clip or quantize.act_clip, or the rate to 0",
        )
    if ranks.size() > 1:
        raise AttarError(
            "training a whole model runs in one process", where="finetune", fix="Start it without a launcher"
        )
    for name, part in components.items():
        if not isinstance(weights_of(part), ResidentWeights):
            fix = "Add --no-stream, or take another recipe"
            raise AttarError("training a whole model needs its weights in memory", where=name, fix=fix)
        for chosen in (recipe.finetune.layers, recipe.finetune.local):
            if chosen is not None:
                matching(plans[name], chosen)


def job_of(recipe: Recipe) -> type[ComponentJob | FinetuneJob | PolishJob]:
    """How a transformer is compressed by the recipe."""
    if recipe.finetune is None:
        return ComponentJob
    return PolishJob if recipe.polishes else FinetuneJob


class _WholeModel(Job):
    """What both ways share: one model in float32, the outputs of the original, a loop that can be killed.

    The model is held once: the original's outputs are computed before anything of it is replaced. The state of the
    training is kept every two minutes, and a run that is taken up again ends with the same bits.
    """

    def __init__(self, *job: Any) -> None:
        """The arguments of `Job`."""
        super().__init__(*job)
        local = self.recipe.finetune.local if self.recipe.finetune is not None else None
        self.local = [] if local is None else matching(self.plan.values(), local)
        self.relation = relation_settings(self.recipe)
        self.features: tuple[nn.Module, int] | None = None  # the last block, and which of its outputs
        self.groups: StepGroups | None = None  # of steps, once layers tell them apart

    def samples(self, prompts: int) -> TracedSteps:
        streams = [OUTPUT, *self.local, *([FEATURES] if self.relation else [])]
        found = TracedSteps(self.name, self.transformer, self.store, prompts, self.workspace, streams)
        prompt, step, _ = found.places[0]
        # blocks come in the order of their calls
        self.adapter.observe(self.store.calls(self.name, prompt, step)[0])
        if self.relation is not None:
            self.features = self._last_features()
        return found

    def _last_features(self) -> tuple[nn.Module, int]:
        """The block before the output head, whose features MPQ-DM compares, and the place of its main output."""
        last = self.adapter.blocks[-1]
        main = self.adapter.main_stream(last)
        return last.module, last.outputs.index(main) if main in last.outputs else 0

    def compute(self, samples: TracedSteps) -> None:
        """The original's outputs, in batches as large as those that are trained on."""
        assert self.recipe.finetune is not None
        samples.compute(self.forward, self.recipe.finetune.batch_size, self.progress)

    def train(self, layers: Mapping[str, Layer], samples: TracedSteps) -> dict[str, Any]:
        """Trains the layers, which are in the model; returns what the evidence says of it."""
        whole = self.recipe.finetune
        assert whole is not None
        before, tuner = self.error(samples), self._tuner(layers, samples)
        known = self.workspace.read_tensors(self.state_file)
        if known is not None:
            tuner.restore(*known)
        steps_left = tuner.step < whole.steps
        self._train(tuner)
        if steps_left:  # a run that is killed behind the training does not train again
            self.workspace.write_tensors(self.state_file, *tuner.state())
        for layer in layers.values():
            layer.requires_grad_(False)
            if isinstance(layer, QuantizedLinear):
                layer.freeze()
        after_all = self.error(samples)
        if not math.isfinite(after_all):  # the last step may have led there, behind a finite loss
            raise AttarError(
                f"the error of the trained model is {after_all}",
                where=self.name,
                fix="Lower the learning rates",
            )
        return {
            "steps": whole.steps, "samples": len(samples), "history": tuner.history,
            "error_before": before, "error_after": after_all,
            **self.arithmetic.evidence,
        }  # fmt: skip

    def _tuner(self, layers: Mapping[str, Layer], samples: TracedSteps) -> Finetuner:
        whole, seed = self.recipe.finetune, f"{self.seed}/{self.name}"
        assert whole is not None
        chosen = None if whole.layers is None else matching(self.plan.values(), whole.layers)
        loss = mse if not self.local else partial(mse_with_layers, main=OUTPUT, weight=whole.local_weight)
        term = groups = None
        if self.relation is not None:
            memory = draw_memory(samples, self.relation.memory, seed) if self.relation.memory else None
            term = RelationTerm(self.relation, memory, seed)
            groups = windows(samples.places, self.relation.window)
        settings = finetune_settings(self.recipe)
        parts = None if self.groups is None else samples.members(self.groups)
        return Finetuner(self.forward, samples, layers, settings, seed, chosen, loss, term, groups, parts)

    def _train(self, tuner: Finetuner) -> None:
        """The steps that are left, with what ends the last one."""
        whole, saved = self.recipe.finetune, time.monotonic()
        assert whole is not None
        again = [block.module for block in self.adapter.blocks] if whole.gradient_checkpointing else []
        with self.progress.task(f"{self.name}: train", whole.steps) as advance:

            def after(tuner: Finetuner, loss: float) -> None:
                nonlocal saved
                advance(tuner.step, f"loss {loss:.2e}")
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.workspace.write_tensors(self.state_file, *tuner.state())
                    saved = time.monotonic()

            try:
                with checkpointed(again):
                    tuner.train(after)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                fix = "Lower finetune.batch_size, size or frames, in another workspace"
                if not whole.gradient_checkpointing:
                    fix = (
                        "Run again with --set finetune.gradient_checkpointing=true, which goes on from the last "
                        "state in the same workspace"
                    )
                raise AttarError(
                    f"out of memory in training step {tuner.step + 1}", where=self.name, fix=fix
                ) from error

    def forward(self, call: BlockCall) -> dict[str, Tensor]:
        """The model's output on one call, and those of the layers that are compared too."""
        if (
            self.groups is not None
        ):  # named in the layers, as what is recomputed is outside of the model's call
            choose_group(self.transformer, self.groups.group(call.constants.get(ARGUMENT)))
        call, found = call.to(self.device), {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                found[name] = output

            return hook

        # layers are replaced on the way, so they are looked up each time
        hooks = [self.transformer.get_submodule(n).register_forward_hook(keep(n)) for n in self.local]
        if self.features is not None:
            last, place = self.features

            def keep_features(module: nn.Module, args: Any, output: Any) -> None:
                features = as_outputs(output)[place]
                if self.adapter.unet and features.ndim == 4:  # (B, C, H, W) -> places as tokens are
                    features = features.flatten(2).mT
                assert self.relation is not None
                # those that are compared, and no more: they are kept for every step
                found[FEATURES] = features[:, :: -(-features.shape[1] // self.relation.places)].contiguous()

            hooks.append(last.register_forward_hook(keep_features))
        try:
            with self.arithmetic():
                output = as_outputs(self.transformer(**call.streams, **call.constants))[0]
        finally:
            for hook in hooks:
                hook.remove()
        return {name: stream.float() for name, stream in {OUTPUT: output, **found}.items()}

    @torch.no_grad()
    def error(self, samples: TracedSteps) -> float:
        """Squared error of the model's output relative to the original's output, mean over some samples."""
        errors = []
        for index in _spread(len(samples)):
            call, target = samples[index]
            output = {OUTPUT: self.forward(call)[OUTPUT]}
            target = like({OUTPUT: target[OUTPUT]}, output)
            errors.append(relative_error(output, target, {OUTPUT: torch.zeros_like(target[OUTPUT])}).item())
        return sum(errors) / len(errors)

    def files(self) -> dict[str, tuple[nn.Module, str, list[str]]]:
        """File -> (module that its layers are in, prefix of their names, their names); those in no block last.

        Once the samples are there: they say in which order the blocks are.
        """
        left, files = list(self.plan), {}
        for block in self.adapter.blocks:
            prefix = f"{block.name}."
            names = [name for name in left if name.startswith(prefix)]
            left = [name for name in left if not name.startswith(prefix)]
            files[f"{self.name}/{block_file(block.index)}"] = (block.module, prefix, names)
        if left:
            files[f"{self.name}/{OUTSIDE}"] = (self.transformer, "", left)
        return files

    @property
    def state_file(self) -> str:
        return f"{self.name}/finetune.safetensors"

    @property
    def report_file(self) -> str:
        return f"{self.name}/finetune.json"


class FinetuneJob:
    """Compresses one transformer in place, as `ComponentJob` does, by training it end to end on all traced steps."""

    def __init__(self, *job: Any) -> None:
        """The arguments of `Job`."""
        self.whole = _WholeModel(*job)

    def run(self, prompts: int) -> dict[str, Any]:
        """Compresses the transformer; returns its part of the evidence. prompts: how many were traced."""
        whole = self.whole
        whole.transformer.requires_grad_(False).eval()
        samples, groups = whole.samples(prompts), None
        if has_groups(whole.plan.values(), block_settings(whole.recipe)):
            groups = samples.groups(whole.recipe.quantize.step_groups)
        if not all(map(whole.workspace.has, [*whole.files(), whole.report_file])):
            self._make(samples, groups)
        results = []
        for file, (module, prefix, _) in whole.files().items():
            result = restore_block(whole.workspace, file, module)
            fill(module, read_layers(whole.workspace, file).get, whole.device)
            results += [result] if prefix else []
        if groups is not None:
            follow_steps(whole.transformer, groups)
        return {"blocks": results, "finetune": whole.workspace.read_json(whole.report_file)}

    def _make(self, samples: TracedSteps, groups: StepGroups | None) -> None:
        whole = self.whole
        open_planned(whole.transformer, whole.plan)
        with types_kept(whole.transformer) as types:
            self._train(samples, groups, types)

    def _train(self, samples: TracedSteps, groups: StepGroups | None, types: dict[str, torch.dtype]) -> None:
        """In float32; what comes out has the types that are given."""
        whole = self.whole
        whole.transformer.float()
        whole.compute(samples)
        whole.groups = groups  # not before: the original is given steps of all groups in a batch
        few = [samples.call(*samples.places[i]) for i in _spread(len(samples))]
        linears: dict[str, nn.Module] = {name: whole.transformer.get_submodule(name) for name in whole.plan}
        settings, seed = block_settings(whole.recipe), f"{whole.seed}/{whole.name}"
        inputs = input_facts(whole.plan, linears, whole.forward, few, settings, seed)
        layers = wrap_linears(
            whole.transformer,
            whole.plan,
            linears,
            inputs,
            whole.forward,
            few,
            settings,
            seed,
            whole.deployed(types),
        )
        linears.clear()  # the layers have what they need of them
        report = whole.train(layers, samples)
        give_types(whole.transformer, types)
        for file, (_, prefix, names) in whole.files().items():
            packed = {name.removeprefix(prefix): self._bake(name, layers.pop(name)) for name in names}
            if not whole.workspace.has(file):  # else a run before was killed behind it, and it is the same
                result = {"block": prefix.removesuffix("."), **UNKNOWN}
                save_block(whole.workspace, file, packed, result)
        whole.workspace.write_json(whole.report_file, report)
        whole.workspace.remove(whole.state_file)
        samples.remove()

    def _bake(self, name: str, layer: QuantizedLinear) -> PackedLinear:
        """The packed layer, in the place of the trained one that has its type back."""
        packed = layer.bake().to(layer.weight.dtype)  # a branch was in float32 as well
        replace_module(self.whole.transformer, name, packed)
        return packed


UNKNOWN = dict.fromkeys(("error_before", "error_after", "loss", "rolled_back", "stopped", "attention"))


class PolishJob:
    """Compresses one transformer block by block, and then trains its scales, biases and clipping end to end.

    Codes, transforms and bytes are those of `ComponentJob`. Until all is trained the blocks on disk are its own; then
    they are written once more, with values that do not depend on what they held.
    """

    def __init__(self, *job: Any) -> None:
        """The arguments of `Job`."""
        self.whole, self.blocks = _WholeModel(*job), ComponentJob(*job)

    def run(self, prompts: int) -> dict[str, Any]:
        """Compresses the transformer; returns its part of the evidence. prompts: how many were traced."""
        whole = self.whole
        whole.transformer.requires_grad_(False).eval()
        samples, trained = whole.samples(prompts), whole.workspace.has(self._file)
        if not trained:
            with types_kept(whole.transformer) as types:
                whole.transformer.float()
                whole.compute(samples)
            give_types(whole.transformer, types)
        evidence = self.blocks.run(prompts)
        whole.groups = self.blocks.groups
        if not trained:
            self._polish(samples)
        report = self._apply()
        samples.remove()
        return evidence | {"finetune": report}

    def _polish(self, samples: TracedSteps) -> None:
        whole = self.whole
        packed, types = packed_layers(whole.transformer), types_of(whole.transformer)
        computing = {name: layer.compute_dtype for name, layer in packed.items()}
        whole.transformer.float()
        layers = {name: ScaledCodes(layer) for name, layer in packed.items()}
        for name, layer in layers.items():
            replace_module(whole.transformer, name, layer)
        report = whole.train(layers, samples)
        for name, layer in packed.items():
            replace_module(whole.transformer, name, layer)
            layer.compute_dtype = computing[name]
        give_types(whole.transformer, types)
        found = {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.trained().items()}
        # all that was trained is in one file before the first block is written over
        whole.workspace.write_tensors(self._file, {key: t.to(types[key]) for key, t in found.items()}, report)
        whole.workspace.remove(whole.state_file)

    def _apply(self) -> dict[str, Any]:
        """Puts the trained tensors into the model and into the blocks on disk; returns the report of the training."""
        whole = self.whole
        stored = whole.workspace.read_tensors(self._file)
        if stored is None:
            raise AttarError("the trained scales are missing", where=self._file, fix="Use another workspace")
        trained, report = stored
        model = dict(tensors_of(whole.transformer))
        for key, tensor in trained.items():
            model[key].data = tensor.to(whole.device)
        packed = packed_layers(whole.transformer)
        for file, (_, prefix, names) in whole.files().items():
            inside = {name.removeprefix(prefix): packed[name] for name in names}
            known = read_layers(whole.workspace, file)
            new = {key: trained[f"{prefix}{key}"] for key in known if f"{prefix}{key}" in trained}
            if any(not torch.equal(known[key], tensor) for key, tensor in new.items()):
                save_block(whole.workspace, file, inside, read_result(whole.workspace, file))
        return report

    @property
    def _file(self) -> str:
        return f"{self.whole.name}/polished.safetensors"


def _spread(count: int) -> list[int]:
    """Places that are spread evenly over all samples."""
    few = min(CHECKED, count)
    return [int((i + 0.5) / few * count) for i in range(few)]
