"""The conductor: runs the stages of a recipe over a pipeline and a workspace.

    trace -> select -> for each block: catch inputs -> wrap -> learn -> round -> bake -> packed pipeline

It knows the order and what is on disk; every piece of mathematics lives in the verbs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attar.calibration.catch import catch_block_calls
from attar.calibration.prompts import GENERAL_PROMPTS
from attar.calibration.score import score_candidates
from attar.calibration.select import ScoreTable, select
from attar.calibration.store import TraceStore
from attar.calibration.trace import trace_pipeline, transformer_components
from attar.errors import AttarError
from attar.identity import pipeline_fingerprint
from attar.losses import joint_token_weights, mse, streams_token_weighted_mse, weight_percentiles
from attar.models.adapter import Block, ModelAdapter, evaluating
from attar.models.attention_mass import attention_mass
from attar.models.block import BlockCall, run_block
from attar.models.source import Source, find_source, load_pipeline
from attar.progress import Progress, SilentProgress
from attar.quantize.block import BlockSettings, quantize_block
from attar.quantize.initialize import TransformSettings
from attar.quantize.linear import replace_module
from attar.quantize.plan import LayerPlan, plan_layers
from attar.quantize.reconstruct import ReconstructionSettings, concatenate_calls
from attar.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from attar.runtime.diffusers_integration import mark_compressed
from attar.runtime.layers import PackedLinear, packed_layers
from attar.workspace import Workspace


@dataclass
class Compression:
    """What a compression did: the evidence that travels with the checkpoint (compression.json)."""

    recipe: dict[str, Any]
    seed: int
    generation: dict[str, Any]
    prompts: list[str]
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # not written: a resumed run has the same bytes

    def to_json(self) -> dict[str, Any]:
        """Everything but the timings."""
        return {k: v for k, v in vars(self).items() if k != "seconds"}


def compress(
    model: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe = DEFAULT_RECIPE,
    *,
    weights: int | None = None,
    acts: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    prompts: Sequence[str] | None = None,
    generation: Mapping[str, Any] | None = None,
    workspace: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Any:
    """Compresses the transformers of a diffusers pipeline and returns the pipeline, ready for `save_pretrained`.

    model: a pipeline, which is changed in place, or anything that `attar.load` takes (a built-in name, a folder, a
    hub id). recipe: published name, YAML path, mapping or Recipe. weights, acts: bits, short for the overrides
    "quantize.weights" and "quantize.acts". prompts: calibration prompts; default: the model's own, else general ones.
    generation: arguments of the pipeline's call while tracing (height, num_frames, ...). workspace: a folder; a killed
    run that is started again with the same arguments goes on there. Without one, a temporary folder is used. seed: of
    noise, selection, rotations and order.

    The result has the attribute `attar_compression` (a `Compression`). Raises AttarError for everything that cannot be
    done; nothing is half-written then.
    """
    bits = {"quantize.weights": weights, "quantize.acts": acts}
    recipe = load_recipe(recipe, {**(overrides or {}), **{k: v for k, v in bits.items() if v is not None}})
    if isinstance(model, (str, Path)):
        source = find_source(str(model))
        pipe = load_pipeline(source)
    else:
        source, pipe = Source(type(model).__name__), model
    if workspace is None:
        with tempfile.TemporaryDirectory(prefix="attar-") as folder:
            return run(pipe, source, recipe, Workspace(folder), prompts, generation, seed, progress)
    return run(pipe, source, recipe, Workspace(workspace), prompts, generation, seed, progress)


def run(
    pipe: Any,
    source: Source,
    recipe: Recipe,
    workspace: Workspace,
    prompts: Sequence[str] | None = None,
    generation: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Any:
    """`compress` with everything resolved."""
    progress = progress or SilentProgress()
    components = transformer_components(pipe)
    plans = {name: plan_component(transformer, recipe) for name, transformer in components.items()}
    chosen_prompts = calibration_prompts(recipe, source, prompts)
    call = source.call_arguments(**(generation or {}))
    check_pool(recipe, chosen_prompts, call)
    for name, transformer in components.items():
        check_finite(name, transformer)
    workspace.claim(
        {
            "recipe": recipe.model_dump(mode="json"),
            "model": pipeline_fingerprint(pipe),
            "prompts": chosen_prompts,
            "generation": call,
            "seed": seed,
        }
    )
    report = Compression(recipe.model_dump(mode="json"), seed, call, chosen_prompts)
    store = TraceStore(workspace.folder / "trace")
    if recipe.needs_data:
        _trace(pipe, recipe, store, chosen_prompts, call, seed, progress, report)
    for name, transformer in components.items():
        started = time.monotonic()
        job = _ComponentJob(name, transformer, plans[name], recipe, workspace, store, seed, progress)
        report.components[name] = job.run(len(chosen_prompts))
        report.seconds[name] = time.monotonic() - started
        mark_compressed(transformer, recipe.name)
    pipe.attar_compression = report
    return pipe


def plan_component(transformer: nn.Module, recipe: Recipe) -> list[LayerPlan]:
    """The plan of every linear layer of one transformer. Raises AttarError if it is already compressed."""
    if packed_layers(transformer):
        raise AttarError(
            "the model is already compressed",
            where=type(transformer).__name__,
            fix="Start from the full-precision model",
        )
    adapter = ModelAdapter.of(transformer)
    inside = [linear for block in adapter.blocks for linear in adapter.linears(block)]
    bits = recipe.quantize
    return plan_layers(inside, adapter.outside_linears(), bits.weights, bits.acts, bits.roles)


def transform_settings(recipe: Recipe) -> TransformSettings:
    q = recipe.quantize
    return TransformSettings(q.scale, q.alpha, q.rotation, q.affine, q.rotation_init, q.order)


def block_settings(recipe: Recipe) -> BlockSettings:
    """The plain settings of one block's quantization that a recipe stands for."""
    q, r, rounding = recipe.quantize, recipe.reconstruct, recipe.rounding
    learning = None
    if r is not None and r.epochs:
        learning = ReconstructionSettings(
            epochs=r.epochs, batch_size=r.batch_size, transform_lr=r.transform_lr, clip_lr=r.clip_lr,
            eta_min_ratio=r.eta_min_ratio, weight_decay=r.weight_decay, normalise_loss=r.normalise_loss,
        )  # fmt: skip
    return BlockSettings(
        transforms=transform_settings(recipe), weight_clip=q.weight_clip, act_clip=q.act_clip, learning=learning,
        train_scale=r is not None and r.train_scale, train_rotation=r is not None and r.train_rotation,
        train_clip=r is not None and r.train_clip,
        gptq_damping=rounding.damping if rounding.method == "gptq" else None, gptq_block=rounding.block,
    )  # fmt: skip


def calibration_prompts(recipe: Recipe, source: Source, given: Sequence[str] | None) -> list[str]:
    """The prompts that are traced: the given ones, else the model's, else general ones; as many as the recipe says."""
    if not recipe.needs_data or recipe.trace is None:
        return []
    if given is not None:
        return list(given)
    pool = source.prompts or list(GENERAL_PROMPTS)
    if len(pool) < recipe.trace.prompts:
        raise AttarError(
            f"the recipe traces {recipe.trace.prompts} prompts, the model brings {len(pool)}",
            fix="Give your own with --prompts",
        )
    return pool[: recipe.trace.prompts]


def check_pool(recipe: Recipe, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
    """Raises AttarError before anything is generated if the pool cannot hold the samples that are asked for."""
    if not recipe.needs_data or recipe.trace is None or recipe.select is None:
        return
    steps = recipe.trace.steps or call.get("num_inference_steps") or 50
    if len(prompts) * steps < recipe.select.count:
        raise AttarError(
            f"{len(prompts)} prompts of {steps} steps give fewer candidates than select.count = {recipe.select.count}",
            where="select.count",
            fix="Ask for fewer samples, or trace more prompts or steps",
        )


def check_finite(name: str, transformer: nn.Module) -> None:
    """Raises AttarError for the first parameter that is not finite."""
    for key, parameter in transformer.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise AttarError("a weight is not finite", where=f"{name}.{key}", fix="Check the model before compressing")


def _trace(
    pipe: Any,
    recipe: Recipe,
    store: TraceStore,
    prompts: list[str],
    call: Mapping[str, Any],
    seed: int,
    progress: Progress,
    report: Compression,
) -> None:
    assert recipe.trace is not None
    started = time.monotonic()
    options = dict(call)
    steps = recipe.trace.steps or options.pop("num_inference_steps", None) or 50
    options.pop("num_inference_steps", None)
    guidance = recipe.trace.guidance_scale if recipe.trace.guidance_scale is not None else options.pop("guidance_scale", None)
    options.pop("guidance_scale", None)
    with progress.task("trace", len(prompts) * steps) as advance:
        trace_pipeline(
            pipe, prompts, store, steps=steps, guidance_scale=guidance, seed=seed, generation=options,
            progress=lambda p, k, n: advance(p * n + k, f"prompt {p + 1} of {len(prompts)}"),
        )  # fmt: skip
    report.seconds["trace"] = time.monotonic() - started


class _ComponentJob:
    """The compression of one transformer: selection, then block after block."""

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
        self.name, self.transformer, self.recipe = name, transformer, recipe
        self.plan = {p.name: p for p in plan if not p.skipped}
        self.workspace, self.store, self.seed, self.progress = workspace, store, seed, progress
        self.adapter = ModelAdapter.of(transformer)
        self.settings = block_settings(recipe)
        self.device = next(transformer.parameters()).device

    def run(self, prompts: int) -> dict[str, Any]:
        """Compresses the transformer in place; returns its part of the evidence."""
        self.transformer.requires_grad_(False).eval()
        evidence: dict[str, Any] = {}
        calls: list[list[dict[str, Any]]] = []
        if self.recipe.needs_data:
            table, chosen = self._selection(prompts)
            evidence["selection"] = {
                "policy": self.recipe.select.policy if self.recipe.select else None,
                "table": vars(table),
                "chosen": chosen,
            }
            calls = [self.store.calls(self.name, table.prompt[i], table.step[i]) for i in chosen]
            self.adapter.observe(calls[0][0])
        segments = self.adapter.segments if calls else [self.adapter.blocks]
        # caught before any block is replaced: these are the full-precision inputs
        starts = {segment[0].index: self._catch(segment[0], calls) for segment in segments}
        blocks: list[dict[str, Any]] = []
        with self.progress.task(f"{self.name}: quantize", len(self.adapter.blocks)) as advance:
            full = quantized = []
            for block in self.adapter.blocks:
                if block.index in starts:
                    full = starts.pop(block.index)
                    # later segments start behind glue that only a run of the model applies
                    quantized = self._catch(block, calls) if self._propagates and block.index else full
                result, full, quantized = self._block(block, full, quantized, advance)
                blocks.append(result)
                note = block.name
                if result["error_before"] is not None:
                    note = f"{block.name} error {result['error_before']:.4f} → {result['error_after']:.4f}"
                advance(block.index + 1, note)
        evidence["blocks"] = blocks
        return evidence

    @property
    def _propagates(self) -> bool:
        return self.recipe.reconstruct is not None and self.recipe.reconstruct.propagate == "quant"

    def _selection(self, prompts: int) -> tuple[ScoreTable, list[int]]:
        """The score table and the chosen rows, from the workspace where they are there already."""
        chosen_by, file = self.recipe.select, f"{self.name}/selection.json"
        assert chosen_by is not None
        known = self.workspace.read_json(file)
        if known is None:
            with self.progress.task(f"{self.name}: score candidates", 1) as advance:
                table = score_candidates(
                    self.store, list(range(prompts)), self.name, self.adapter,
                    features=chosen_by.features, norm=chosen_by.norm,
                    progress=lambda done, total: advance(done / total, f"{done} of {total}"),
                )  # fmt: skip
            chosen = select(
                chosen_by.policy, table, chosen_by.count, self.seed,
                cap_per_prompt=chosen_by.cap_per_prompt, cap_per_step=chosen_by.cap_per_step,
            )  # fmt: skip
            known = {"table": vars(table), "chosen": chosen}
            self.workspace.write_json(file, known)
        return ScoreTable(**known["table"]), known["chosen"]

    def _catch(self, block: Block, calls: list[list[dict[str, Any]]]) -> list[BlockCall]:
        """The block's inputs for every sample, in float32 on the CPU; guidance branches become one batch."""
        if not calls:
            return []
        flat = [call for branches in calls for call in branches]
        caught = iter(catch_block_calls(self.transformer, self.adapter, block.index, flat, store_device="cpu"))
        merged = []
        for branches in calls:
            parts = [next(caught) for _ in branches]
            merged.append((parts[0] if len(parts) == 1 else concatenate_calls(parts)).to(dtype=torch.float32))
        return merged

    def _block(
        self, block: Block, full: list[BlockCall], quantized: list[BlockCall], advance: Callable[..., None]
    ) -> tuple[dict[str, Any], list[BlockCall], list[BlockCall]]:
        """One block, read from the workspace or made; returns its result and the calls of the next block."""
        file = self._file(block.index)
        known = self.workspace.read_tensors(file)
        if known is None:
            return self._make_block(block, full, quantized, file, advance)
        result = _restore_block(block.module, known)
        following = self.workspace.read_tensors(self._boundary(block.index + 1))
        if following is not None:
            full, quantized = _with_boundary(full, quantized, following[0], self._propagates)
        elif full and not self._last_of_segment(block) and not self.workspace.has(self._file(block.index + 1)):
            raise AttarError(
                "the inputs of the next block are missing",
                where=str(self.workspace.folder / self._boundary(block.index + 1)),
                fix=f"Delete {file} there and run again",
            )
        return result, full, quantized

    def _make_block(
        self,
        block: Block,
        full: list[BlockCall],
        quantized: list[BlockCall],
        file: str,
        advance: Callable[..., None],
    ) -> tuple[dict[str, Any], list[BlockCall], list[BlockCall]]:
        module, prefix = block.module, f"{block.name}."
        plans = {name.removeprefix(prefix): p for name, p in self.plan.items() if name.startswith(prefix)}
        dtypes = {name: tensor.dtype for name, tensor in module.named_parameters()}
        if full:
            module.float()  # learned in float32 whatever the model is stored in

        def runner(call: BlockCall) -> dict[str, Tensor]:
            return run_block(module, call.to(self.device), block.outputs)

        targets, contexts, masses = self._targets(block, full)

        def step(epoch: int, done: int, loss: float) -> None:
            epochs = self.settings.learning.epochs if self.settings.learning else 1
            advance(block.index + min(0.99, epoch / epochs), f"{block.name} epoch {epoch}/{epochs} loss {loss:.2e}")

        learned = self.recipe.reconstruct
        outcome = quantize_block(
            module, plans, runner, quantized, targets, self.settings,
            loss=_loss(learned.loss if learned else "mse"), contexts=contexts,
            seed=f"{self.seed}/{self.name}/{block.name}", progress=step,
        )  # fmt: skip
        following_full = [call.with_streams(_cpu(t)) for call, t in zip(full, targets, strict=True)]
        following = following_full
        if self._propagates:
            with torch.no_grad():
                following = [call.with_streams(_cpu(runner(call))) for call in quantized]
        for name, parameter in module.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])
        for name, layer in outcome.layers.items():
            layer.compute_dtype = dtypes.get(f"{name}.weight", layer.compute_dtype)
        result = {
            "block": block.name,
            "error_before": outcome.error_before,
            "error_after": outcome.error_after,
            "loss": None if outcome.learning is None else [outcome.learning.error_before, *outcome.learning.history],
            "rolled_back": None if outcome.learning is None else outcome.learning.rolled_back,
            "stopped": None if outcome.learning is None else outcome.learning.stopped,
            "attention": masses,
        }
        # the next block's inputs first: a block that is on disk always has its successor's inputs beside it
        if full and not self._last_of_segment(block):
            self.workspace.write_tensors(
                self._boundary(block.index + 1), _boundary_tensors(following_full, following, self._propagates)
            )
        _save_block(self.workspace, file, outcome.layers, result)
        self.workspace.remove(self._boundary(block.index))
        return result, following_full, following

    def _targets(
        self, block: Block, calls: list[BlockCall]
    ) -> tuple[list[dict[str, Tensor]], list[Any] | None, dict[str, Any] | None]:
        """Full-precision outputs of the block, and for token weighting the λ of every sample with their statistics."""
        learned = self.recipe.reconstruct
        weighted = learned is not None and learned.epochs > 0 and learned.loss == "token_weighted"
        targets, contexts, shares = [], [], []
        with evaluating(block.module):
            for call in calls:
                here = call.to(self.device)
                if not weighted:
                    targets.append(_cpu(run_block(block.module, here, block.outputs)))
                    continue
                assert learned is not None
                with attention_mass(self.adapter, block) as mass:
                    targets.append(_cpu(run_block(block.module, here, block.outputs)))
                found = mass.per_stream()
                if not found:
                    contexts.append({})
                    continue
                contexts.append(
                    joint_token_weights(
                        found, low=learned.lambda_min, high=learned.lambda_max, cap_quantile=learned.cap_quantile
                    )
                )
                joined = torch.cat(list(found.values()), dim=1)
                shares.append(joined.sort(dim=1, descending=True).values.cumsum(1).mean(0) / joined.sum(1).mean())
        if not weighted:
            return targets, None, None
        if not shares:
            return targets, contexts, None
        curve = torch.stack(shares).mean(0)
        points = torch.linspace(0, len(curve), 21).round().long()
        weights = torch.cat([w.flatten() for context in contexts for w in context.values()])
        statistics = {
            "curve": [0.0] + [curve[i - 1].item() for i in points[1:]],
            "weights": weight_percentiles(weights, (5, 25, 50, 75, 95)),
        }
        return targets, contexts, statistics

    def _file(self, index: int) -> str:
        return f"{self.name}/block-{index:03d}.safetensors"

    def _boundary(self, index: int) -> str:
        return f"{self.name}/boundary-{index:03d}.safetensors"

    def _last_of_segment(self, block: Block) -> bool:
        return not self.recipe.needs_data or self.adapter.segment_of(block)[-1] is block


def _loss(name: str) -> Callable[..., Tensor]:
    if name == "mse":
        return lambda prediction, target, context: mse(prediction, target)
    return lambda prediction, target, context: streams_token_weighted_mse(prediction, target, context or {})


def _cpu(streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu") for name, tensor in streams.items()}


def _boundary_tensors(full: list[BlockCall], quantized: list[BlockCall], both: bool) -> dict[str, Tensor]:
    paths = [("full", full)] + ([("quantized", quantized)] if both else [])
    return {
        f"{path}.{i}.{name}": tensor
        for path, calls in paths
        for i, call in enumerate(calls)
        for name, tensor in call.streams.items()
    }


def _with_boundary(
    full: list[BlockCall], quantized: list[BlockCall], tensors: Mapping[str, Tensor], both: bool
) -> tuple[list[BlockCall], list[BlockCall]]:
    """The calls of the block behind a boundary, with the streams that were stored there."""

    def put(path: str, calls: list[BlockCall]) -> list[BlockCall]:
        found: list[dict[str, Tensor]] = [{} for _ in calls]
        for key, tensor in tensors.items():
            kind, index, name = key.split(".", 2)
            if kind == path:
                found[int(index)][name] = tensor
        return [call.with_streams(streams) for call, streams in zip(calls, found, strict=True)]

    following = put("full", full)
    return following, put("quantized", quantized) if both else following


def _save_block(workspace: Workspace, file: str, layers: Mapping[str, PackedLinear], result: dict[str, Any]) -> None:
    tensors = {f"{name}.{k}": v for name, layer in layers.items() for k, v in layer.state_dict().items()}
    shapes = {
        name: {
            "scheme": layer.scheme(), "in": layer.in_features, "out": layer.out_features,
            "bias": layer.bias is not None, "dtype": str(layer.compute_dtype).removeprefix("torch."),
        }
        for name, layer in layers.items()
    }  # fmt: skip
    workspace.write_tensors(file, tensors, {"layers": shapes, "result": result})


def _restore_block(module: nn.Module, stored: tuple[dict[str, Tensor], Any]) -> dict[str, Any]:
    """Puts the stored packed layers into the block; returns the block's result."""
    tensors, meta = stored
    for name, shape in meta["layers"].items():
        old: Any = module.get_submodule(name)
        layer = PackedLinear.from_scheme(
            shape["scheme"], shape["in"], shape["out"], shape["bias"], device="cpu", dtype=getattr(torch, shape["dtype"])
        )
        prefix = f"{name}."
        layer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        replace_module(module, name, layer.to(old.weight.device))
    return meta["result"]
