"""What a calibration costs: the arithmetic that the dry run feeds with measurements, and the plan with counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from attar.forecast.counts import Counts
from attar.forecast.hardware import Hardware
from attar.forecast.latency import predict_latency
from attar.models.adapter import ModelAdapter
from attar.models.arithmetic import default_precision
from attar.quantize.plan import LayerPlan
from attar.quantize.recompute import LEAST, PIECE
from attar.recipe import Recipe
from attar.settings import block_settings

# Beside the epochs a sample passes a block for its target, statistics, errors, Hessians and propagation.
PASSES = 6
# Measured on Wan blocks of width 1536 with learned Kronecker rotations, at 512 to 4,096 tokens, in both precisions: a
# training step took within 15 % of three forwards and, for transforms, fake quantization and their gradients, moving
# 28 bytes for each that the plain forward writes, and 86 for each of the weights.
STEP_FORWARDS, MOVED_WRITTEN, MOVED_WEIGHTS = 3.0, 28.0, 86.0
# It keeps 0.7 bytes for each that the plain forward writes, and the rounded weights; what one layer computes anew in
# its backward pass comes, with gradients, to about eight copies of its input, or of a piece of it, and of its weight.
KEPT_WRITTEN, ANEW = 0.7, 8
# GPTQ walks the columns of a weight one by one, with some twenty small kernels each; seconds a column, measured there.
GPTQ_COLUMN = 3e-4


@dataclass(frozen=True)
class BlockCost:
    """Seconds of one block: done once, one forward of a sample, one training step of a sample; the bytes that a
    training step keeps for its backward pass, and those that it computes anew in it, for one layer at a time; the bytes
    of its input, in float32."""

    once: float
    forward: float
    epoch: float
    saved: float
    anew: float
    input: float = 0.0


@dataclass(frozen=True)
class CalibrationMemory:
    """Peak bytes beside the libraries: on the device that computes, and in main memory. On a CPU they add up."""

    device: float
    host: float


def learning_seconds(blocks: Iterable[BlockCost], samples: int, epochs: int) -> float:
    """Seconds of all blocks, one after the other."""
    return sum(b.once + samples * (epochs * b.epoch + PASSES * b.forward) for b in blocks)


def finetune_seconds(blocks: Iterable[BlockCost], samples: int, recipe: Recipe) -> float:
    """Seconds of training the whole model: the original's outputs of all samples, and a training step of every block
    for each sample of each update. Layers outside the blocks are left out."""
    assert recipe.finetune is not None
    updates, again = (
        recipe.finetune.steps * recipe.finetune.batch_size,
        recipe.finetune.gradient_checkpointing,
    )
    return sum(samples * b.forward + updates * (b.epoch + again * b.forward) for b in blocks)


def finetune_memory(
    model: float,
    transformers: Iterable[nn.Module],
    recipe: Recipe,
    blocks: Iterable[BlockCost],
    checkpoints: bool | None = None,
) -> CalibrationMemory:
    """Peak bytes while a whole model is trained: its weights in float32, and where they are trained a copy of each, its
    gradient and two moments; what each sample keeps for its backward pass through all blocks, or with checkpoints of
    each its input and of one all, and what one layer at a time computes anew. checkpoints: None as the recipe says."""
    assert recipe.finetune is not None
    count = max(sum(p.numel() for p in part.parameters()) for part in transformers)
    trained = 4 if recipe.finetune.weight_lr else 0
    known = list(blocks)
    if recipe.finetune.gradient_checkpointing if checkpoints is None else checkpoints:
        kept = sum(b.input for b in known) + max((b.saved for b in known), default=0.0)
    else:
        kept = sum(b.saved for b in known)
    anew = max((b.anew for b in known), default=0.0)
    kept *= recipe.finetune.batch_size
    return CalibrationMemory(model + 4 * count * (1 + trained) + kept + anew, 0.0)


def allocation_seconds(
    block: BlockCost,
    planned: Mapping[str, LayerPlan],
    recipe: Recipe,
    step_seconds: float,
    unet: bool = False,
) -> float:
    """Seconds of one block for choosing bits, at most: each sample passes it once for each layer and width, which take
    what comes before the layer from one run for each width; twice for its inputs, once for its target, and once with
    all layers quantized. 0 without a budget.

    step_seconds: of the whole model, which each sample passes with the block's weights quantized, and with its
    activations, where errors are followed into the latents; with metrics also for each group of layers."""
    if recipe.allocate is None:
        return 0.0
    widths = len(recipe.widths) + (len(recipe.allocate.act_widths) if recipe.chooses_acts else 0)
    followed = {"block": 0, "latents": 1, "metrics": 1 + 3}[recipe.allocate.objective]  # three groups
    followed *= 1 + recipe.chooses_acts
    passes = widths * (len(planned) + 1) + 4 + followed
    return recipe.allocate.samples * (passes * block.forward + followed * step_seconds)


def calibration_memory(
    model: float,
    transformers: Iterable[nn.Module],
    recipe: Recipe,
    samples: int = 0,
    streams: float = 0.0,
    constants: float = 0.0,
    saved: float = 0.0,
) -> CalibrationMemory:
    """Peak bytes while blocks are made.

    On the device lie the pipeline's modules (`model` bytes), the largest block once more in float32, and what one
    training step keeps. In main memory lie the samples of one block boundary: streams and constants, bytes of one
    sample in float32, the streams once as inputs and once as targets, twice as often where the quantized blocks'
    outputs go on.
    """
    largest = 4 * max(
        sum(p.numel() for p in block.module.parameters())
        for part in transformers
        for block in ModelAdapter.of(part).blocks
    )
    copies = 4 if recipe.reconstruct is not None and recipe.reconstruct.propagate == "quant" else 2
    return CalibrationMemory(model + largest + saved, samples * (copies * streams + constants))


def block_costs(
    counts: Counts, plans: Mapping[str, LayerPlan], recipe: Recipe, hardware: Hardware, precision: str
) -> list[BlockCost]:
    """The cost of every block of a transformer on hardware, from the counts of one sample's forward.

    precision: of the blocks while they are learned (`Arithmetic`). For each linear GPTQ inverts a matrix of the
    input's width and walks its columns: about in³ + in²·out multiply-adds, in float32.
    """
    learns = block_settings(recipe).epochs > 0 or recipe.finetune is not None
    batch = 1 if recipe.finetune is None else recipe.finetune.batch_size
    costs = []
    for name in counts.blocks:
        block = while_learned(counts.where(lambda o, name=name: o.block == name), precision)
        forward = predict_latency(block, hardware)["total"]
        planned = [(o, plans[o.name]) for o in block.operations if o.name in plans]
        calibrated = [p for _, p in planned if not p.plain]
        once = 0.0
        if recipe.rounding.method == "gptq":
            work = sum(2.0 * p.in_features**2 * (p.in_features + p.out_features) for p in calibrated)
            once = work / (hardware.rate("fp32") * hardware.efficiency["gemm"])
            once += GPTQ_COLUMN * sum(p.in_features for p in calibrated)
        epoch = saved = anew = 0.0
        if learns:
            written = sum(o.written for o in block.operations)
            weights = sum(p.in_features * p.out_features for _, p in planned)
            moved = MOVED_WRITTEN * written + MOVED_WEIGHTS * weights
            epoch = STEP_FORWARDS * forward + moved / (hardware.bandwidth * hardware.efficiency["bandwidth"])
            saved = KEPT_WRITTEN * written + 4.0 * weights
            anew = max((computed_anew(p, batch * o.rows) for o, p in planned), default=0.0)
        # bfloat16 counted, float32 held; as many numbers go in as come out
        costs.append(BlockCost(once, forward, epoch, saved, anew, 2.0 * counts.blocks[name].outputs))
    return costs


def computed_anew(plan: LayerPlan, rows: int) -> float:
    """Bytes that the backward pass of one layer computes anew, for that many rows of its input."""
    inputs, weights = rows * plan.in_features, plan.in_features * plan.out_features
    return 4.0 * ANEW * (min(inputs, PIECE) * (inputs >= LEAST) + weights * (weights >= LEAST))


def while_learned(counts: Counts, precision: str) -> Counts:
    """The same work as it is done while a block is learned: tensors and arithmetic in float32, or with products and
    attention as they are."""
    wider, kept = {"bf16": 2, "fp16": 2}, {"bfloat16": ("linear", "attention"), "float32": ()}[precision]
    return Counts(
        tuple(
            replace(
                o, format="fp32", read=o.read * wider[o.format], written=o.written * wider[o.format],
                weights=o.weights * wider[o.format],
            )
            if o.format in wider and o.part not in kept
            else o
            for o in counts.operations
        ),
        counts.blocks,
    )  # fmt: skip


def forecast_calibration(
    counts: Mapping[str, Counts],
    plans: Mapping[str, list[LayerPlan]],
    modules: Mapping[str, nn.Module],
    recipe: Recipe,
    hardware: Hardware,
    steps: int,
    step_seconds: float,
) -> dict[str, Any]:
    """Seconds of tracing, choosing bits and learning, and peak bytes, on hardware, for the samples that the recipe
    asks for, "streamed" with weights that are read block by block, "checkpointed" with gradient checkpointing where the
    whole model is trained; and the precision that blocks are learned in, by default that of a model in 16 bits.

    counts: of one sample, that is of all branches of one denoising step, by transformer. steps: of the model, where
    the recipe does not say. step_seconds: of one denoising step in full precision. Where two experts share the steps
    each is learned on samples of its own. Scoring candidates and catching block inputs are left out.
    """
    transformers = [modules[name] for name in counts]
    model = sum(t.nbytes for part in modules.values() for t in [*part.parameters(), *part.buffers()])
    traced = recipe.traced
    if traced is None:
        memory = calibration_memory(model, transformers, recipe)
        nothing = dict.fromkeys(("trace_seconds", "allocate_seconds", "learn_seconds"), 0.0)
        rest = {"streamed": memory.device - model, "checkpointed": None}
        return {**nothing, "precision": None, **vars(memory), **rest}
    chosen = recipe.select.count if recipe.needs_data and recipe.select is not None else 0
    settings = block_settings(recipe)
    precision = recipe.precision or default_precision("cpu" if hardware.name == "cpu" else "cuda", True)
    whole = recipe.finetune
    learn = allocating = saved = trained = spared = streams = constants = 0.0
    for name, counted in counts.items():
        known = {p.name: p for p in plans[name] if not p.skipped}
        costs = block_costs(counted, known, recipe, hardware, precision)
        if whole is not None:
            learn += finetune_seconds(costs, traced.prompts * (traced.steps or steps), recipe)
            trained = max(trained, finetune_memory(model, transformers, recipe, costs).device)
            spared = max(spared, finetune_memory(model, transformers, recipe, costs, True).device)
        if chosen:
            learn += learning_seconds(costs, chosen, settings.epochs)
        for block, cost in zip(counted.blocks, costs, strict=True):
            inside = {path: plan for path, plan in known.items() if path.startswith(f"{block}.")}
            allocating += allocation_seconds(cost, inside, recipe, step_seconds)
        saved = max([saved, *(c.saved + c.anew for c in costs)])
        for traffic in counted.blocks.values():  # bfloat16 counted, float32 held
            streams = max(streams, 2.0 * traffic.outputs)
            constants = max(constants, 2.0 * max(0, traffic.inputs - traffic.outputs))
    held = max(chosen, recipe.allocate.samples if recipe.allocate is not None else 0)
    memory = calibration_memory(model, transformers, recipe, held, streams, constants, saved)
    # a whole model is trained in memory
    streamed = memory.device - model if whole is None else None
    checkpointed = None if whole is None else max(memory.device, spared)
    memory = CalibrationMemory(max(memory.device, trained), memory.host)
    trace = traced.prompts * (traced.steps or steps) * step_seconds
    return {
        "trace_seconds": trace,
        "allocate_seconds": allocating,
        "learn_seconds": learn,
        "precision": precision,
        **vars(memory),
        "streamed": streamed,
        "checkpointed": checkpointed,
    }
