"""The conductor: runs the stages of a recipe over a pipeline and a workspace.

    trace -> select -> for each block: catch inputs -> wrap -> learn -> round -> bake -> packed pipeline

It knows the order and what is on disk; every piece of mathematics lives in the verbs.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attar import ranks
from attar.allocation import Allocation, allocate
from attar.budget.plan_file import PlanFile, read_plan
from attar.calibration.prompts import GENERAL_PROMPTS
from attar.calibration.store import TraceStore
from attar.calibration.trace import trace_pipeline, transformer_components
from attar.candidates import check_budget
from attar.errors import AttarError
from attar.finetuning import check_trainable, job_of
from attar.identity import folder_fingerprint, pipeline_fingerprint
from attar.models.alone import Alone
from attar.models.calls import known_classes, makes_videos, steps_of
from attar.models.offload import is_offloaded
from attar.models.source import Source, find_source, load_pipeline, stored_dtypes
from attar.models.weights import weights_of
from attar.planning import Plans, plan_components, with_plan, with_widths
from attar.pool import check_frames, check_pool, check_traced
from attar.progress import Progress, SilentProgress
from attar.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from attar.runtime.diffusers_integration import mark_compressed
from attar.runtime.transformers_integration import mark_text_encoder
from attar.stages import Trace
from attar.synthesis import autoencoders, make_samples
from attar.text_encoder import compress_text_encoder, plan_text_encoders, text_encoders
from attar.workspace import Workspace


@dataclass
class Compression:
    """What a compression did: the evidence that travels with the checkpoint (compression.json).

    allocation: how the bits were chosen, where the recipe has a budget. plans: of every component, as carried out.
    """

    recipe: dict[str, Any]
    seed: int
    generation: dict[str, Any]
    prompts: list[str]
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    text_encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    allocation: Allocation | None = None
    plans: Plans = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # not written: a resumed run has the same bytes

    def to_json(self) -> dict[str, Any]:
        """Everything but the timings, and the plans, which are written where they are shown."""
        content = {k: v for k, v in vars(self).items() if k not in ("seconds", "plans")}
        return {**content, "allocation": None if self.allocation is None else asdict(self.allocation)}


def compress(
    model: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe = DEFAULT_RECIPE,
    *,
    weights: int | None = None,
    acts: int | None = None,
    budget: str | None = None,
    plan: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    prompts: str | Sequence[str] | None = None,
    generation: Mapping[str, Any] | None = None,
    workspace: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Any:
    """Compresses the transformers of a diffusers pipeline, or with a recipe that synthesises its samples the decoder of
    its autoencoder, and returns the pipeline, ready for `save_pretrained`.

    model: a pipeline, which is changed in place, or anything that `attar.load` takes (a built-in name, a folder, a
    hub id). An autoencoder may also be given alone, as an object or a folder; what is returned then has it as `vae`.
    recipe: published name, YAML path, mapping or Recipe. weights, acts: bits, short for the overrides
    "quantize.weights" and "quantize.acts". budget: "0.30x", "3.2bits", "0.5dB" or "same", short for
    "allocate.budget": bits for each layer by measured sensitivity. plan: a plan file with the bits of each layer, in
    the place of a budget that the recipe has. prompts: for calibration; default: the model's own, else general ones.
    generation: arguments of the pipeline's call while tracing (height, num_frames, ...). Neither is read by a recipe
    that traces nothing. workspace: a folder; a killed run that is started again with the same arguments goes on there.
    Without one, a temporary folder is used. seed: of noise, selection, rotations and order.

    The result has the attribute `attar_compression` (a `Compression`). Raises AttarError for everything that cannot be
    done; no file is half-written then, and all that the request itself can be wrong in is found before the first
    layer is touched.
    """
    short = {"quantize.weights": weights, "quantize.acts": acts, "allocate.budget": budget}
    overrides = {**(overrides or {}), **{k: v for k, v in short.items() if v is not None}}
    recipe = load_recipe(recipe, overrides)
    layers = None if plan is None else read_plan_for(plan, overrides)
    if isinstance(model, (str, Path)):
        source = find_source(str(model), alone=recipe.synthesize is not None)
        pipe = load_pipeline(source)
    elif isinstance(model, nn.Module):
        if recipe.synthesize is None:
            raise AttarError(
                "a model without its pipeline cannot be traced",
                where=type(model).__name__,
                fix="Give the pipeline; autoencoders alone are compressed by recipes such as zeroq",
            )
        source, pipe = Source(type(model).__name__, alone=True), Alone(model)
    else:
        source, pipe = Source(type(model).__name__, classes=known_classes(model)), model
    if layers is not None:
        recipe = with_plan(recipe, layers, components_of(pipe, recipe))
    if workspace is None:
        with tempfile.TemporaryDirectory(prefix="attar-") as folder:
            return run(pipe, source, recipe, Workspace(folder), prompts, generation, seed, progress)
    return run(pipe, source, recipe, Workspace(workspace), prompts, generation, seed, progress)


def read_plan_for(path: str | Path, overrides: Mapping[str, Any]) -> PlanFile:
    """A plan file, which takes the place of a recipe's own budget. AttarError where another one is asked for too."""
    asked = overrides.get("allocate.budget")
    if asked is not None or isinstance(overrides.get("allocate"), Mapping):
        raise AttarError("a plan and a budget are given", fix="Choose one of both")
    return read_plan(path)


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
    with _prepared(pipe, source, recipe, workspace, prompts, generation, seed, progress) as job:
        report, store = job
        if report.allocation is not None:
            recipe = report.allocation.apply(recipe)
        components = components_of(pipe, recipe)
        report.plans = plan_components(components, recipe)
        for name, transformer in components.items():
            started = time.monotonic()
            plan = report.plans[name]
            folder = source.folder
            stored = {} if folder is None else stored_dtypes(source.place(folder, name))
            part = job_of(recipe)(name, transformer, plan, recipe, workspace, store, seed, progress, stored)
            report.components[name] = part.run(len(report.prompts))
            report.seconds[name] = time.monotonic() - started
            mark_compressed(transformer, recipe.name)  # type: ignore[arg-type]
        text_plans = plan_text_encoders(pipe, recipe)
        for name, encoder in text_encoders(pipe).items() if text_plans else ():
            started = time.monotonic()
            layers = compress_text_encoder(name, encoder, text_plans[name], workspace, progress)
            report.text_encoders[name] = {"layers": layers}
            report.seconds[name] = time.monotonic() - started
            mark_text_encoder(encoder, recipe.name)
    pipe.attar_compression = report
    return pipe


def choose_plan(
    pipe: Any,
    source: Source,
    recipe: Recipe,
    workspace: Workspace,
    prompts: Sequence[str] | None = None,
    generation: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Allocation:
    """Only the first part of `run` for a recipe with a budget: its bits. The plan file is in the workspace then, and
    `run` can go on there."""
    if recipe.allocate is None:
        raise AttarError(
            "the recipe has no budget, or one that gives the widest bits to every layer",
            where="allocate.budget",
            fix="Give one with --budget that leaves a choice",
        )
    with _prepared(
        pipe, source, recipe, workspace, prompts, generation, seed, progress or SilentProgress()
    ) as job:
        assert job[0].allocation is not None
        return job[0].allocation


@contextmanager
def _prepared(
    pipe: Any,
    source: Source,
    recipe: Recipe,
    workspace: Workspace,
    prompts: Sequence[str] | None,
    generation: Mapping[str, Any] | None,
    seed: int,
    progress: Progress,
) -> Iterator[tuple[Compression, TraceStore]]:
    """Inside, the workspace is claimed, the pipeline traced and bits chosen, and no layer is touched yet."""
    if is_offloaded(pipe):
        raise AttarError(
            "an offloaded pipeline is not compressed: its weights are where hooks put them",
            where=type(pipe).__name__,
            fix="Load it without offload; for models larger than the device there is attar compress --stream",
        )
    components = components_of(pipe, recipe)
    bits = recipe.quantize.weights
    plans = plan_components(components, recipe if recipe.allocate is None else with_widths(recipe, bits))
    check_trainable(components, plans, recipe)
    check_budget(components, recipe)
    plan_text_encoders(pipe, recipe)
    chosen_prompts = calibration_prompts(recipe, source, prompts)
    call = plain_arguments(source.call_arguments(**(generation or {})))
    check_seed(seed)
    steps = traced_steps(recipe, pipe, call)
    check_pool(recipe, chosen_prompts, steps, seed)
    check_frames(recipe, recipe.synthesize is not None or makes_videos(pipe))
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            check_finite(name, part)
    workspace.claim(
        {
            "recipe": recipe.identity,
            "model": fingerprint(pipe, source, components),
            "prompts": chosen_prompts,
            "generation": call,
            "seed": seed,
        }
    )
    try:
        report = Compression(recipe.model_dump(mode="json"), seed, call, chosen_prompts)
        store = TraceStore(workspace.folder / "trace")
        if recipe.traced is not None:
            started = time.monotonic()
            _trace(pipe, recipe.traced, store, chosen_prompts, steps, call, seed, progress)
            report.seconds["trace"] = time.monotonic() - started
            check_traced(recipe, store, components, len(chosen_prompts), seed)
        if recipe.synthesize is not None and (recipe.needs_data or recipe.allocate is not None):
            started = time.monotonic()
            for name, part in components.items():
                make_samples(name, part, recipe.synthesize, workspace, seed, progress)
            report.seconds["synthesize"] = time.monotonic() - started
        if recipe.allocate is not None:
            started = time.monotonic()
            report.allocation = allocate(
                components, recipe, workspace, store, len(chosen_prompts), seed, progress
            )
            report.seconds["allocate"] = time.monotonic() - started
        yield report, store
    finally:
        workspace.release()


def calibration_prompts(recipe: Recipe, source: Source, given: str | Sequence[str] | None) -> list[str]:
    """The prompts that are traced: the given ones, else the model's, else its classes, else general ones; as many as
    the recipe says."""
    if recipe.traced is None:
        return []
    if given is not None:
        if not given:
            raise AttarError("no prompts were given", fix="Give at least one, or leave them to the model")
        return [given] if isinstance(given, str) else list(given)
    pool = source.prompts or source.classes or list(GENERAL_PROMPTS)
    if len(pool) < recipe.traced.prompts:
        raise AttarError(
            f"the recipe traces {recipe.traced.prompts} prompts, the model brings {len(pool)}",
            fix="Give your own with --prompts",
        )
    return pool[: recipe.traced.prompts]


def traced_steps(recipe: Recipe, pipe: Any, call: Mapping[str, Any]) -> int:
    """Denoising steps of a traced prompt; 0 where none is traced."""
    return 0 if recipe.traced is None else recipe.traced.steps or steps_of(pipe, call)


def components_of(pipe: Any, recipe: Recipe) -> dict[str, nn.Module]:
    """What a recipe compresses, by component name: the denoisers, or with synthesised samples the autoencoder.

    Raises AttarError where the pipeline has none.
    """
    return transformer_components(pipe) if recipe.synthesize is None else autoencoders(pipe)


def fingerprint(pipe: Any, source: Source, components: Mapping[str, nn.Module]) -> str:
    """Of the folder that the pipeline comes from, with the type that it works in; else of the pipeline itself."""
    if source.folder is None:
        return pipeline_fingerprint(pipe)
    return folder_fingerprint(source.folder, next(iter(components.values())).dtype)  # type: ignore[arg-type]


def division(recipe: Recipe) -> str:
    """What several processes share of the work, in one line for the user."""
    if not recipe.needs_data:
        if recipe.traced is not None:
            return "prompts and the samples of the budget are shared"
        return "the recipe needs no data, so there is nothing to share; all do the same"
    size, learned = ranks.size(), recipe.reconstruct
    shared = "prompts and calibration samples are shared"
    if learned is None or not learned.epochs or learned.batch_size >= size:
        return shared
    return (
        f"{shared}, but a learning step takes reconstruct.batch_size = {learned.batch_size}, so {learned.batch_size} "
        f"learn at a time; --set reconstruct.batch_size={size} is faster and takes fewer, larger steps"
    )


def check_seed(seed: int) -> None:
    """Raises AttarError for a seed that torch's generators do not take."""
    if not isinstance(seed, int) or not 0 <= seed < 2**62:
        raise AttarError(f"the seed cannot be {seed}", where="seed", fix="Give a whole number from 0")


def plain_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as they come back from a file. Raises AttarError for one that JSON does not know."""
    try:
        return json.loads(json.dumps(call))
    except TypeError as error:
        raise AttarError(f"a generation argument cannot be stored as JSON: {error}") from error


def check_finite(name: str, part: nn.Module) -> None:
    """Raises AttarError for the first weight of a component that is not finite; streamed ones are read once for it."""
    for key, parameter in weights_of(part).tensors():
        # torch has no test of 8-bit floats
        small = parameter.is_floating_point() and parameter.element_size() == 1
        if not bool(torch.isfinite(parameter.float() if small else parameter).all()):
            raise AttarError(
                "a weight is not finite", where=f"{name}.{key}", fix="Check the model before compressing"
            )


def _trace(
    pipe: Any,
    trace: Trace,
    store: TraceStore,
    prompts: list[str],
    steps: int,
    call: Mapping[str, Any],
    seed: int,
    progress: Progress,
) -> None:
    options = {key: value for key, value in call.items() if key != "num_inference_steps"}
    guidance = options.pop("guidance_scale", None)
    if trace.guidance_scale is not None:
        guidance = trace.guidance_scale
    with progress.task("trace", len(prompts) * steps) as advance:
        trace_pipeline(
            pipe, prompts, store, steps=steps, guidance_scale=guidance, seed=seed, generation=options,
            progress=lambda p, k, n: advance(p * n + k, f"prompt {p + 1} of {len(prompts)}"),
        )  # fmt: skip
