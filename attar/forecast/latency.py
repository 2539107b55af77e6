"""Seconds from counts: a roofline for every operation, the same counts after a recipe, and Amdahl's bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from attar.forecast.counts import Counts, Operation
from attar.forecast.hardware import FEW_BITS, Hardware
from attar.quantize.initialize import TransformSettings
from attar.quantize.plan import SALIENT_SHARE, LayerPlan, weight_bytes
from attar.quantize.transforms import kronecker_factors
from attar.runtime.backend import INTEGERS
from attar.runtime.block_rotations import block_width

PARTS: tuple[str, ...] = ("linear", "attention", "transform", "rest")


def predict_latency(counts: Counts, hardware: Hardware) -> dict[str, float]:
    """Seconds of each part ("linear", "attention", "transform", "rest") and their sum, "total".

    Each operation takes the longer of its arithmetic, at the rate of its format, and its traffic, at the memory's
    bandwidth, both times the share that kernels reach (`hardware.ideal()` has perfect ones). Kernels run one after the
    other; what is kept in caches between them, and the time of launching them, are left out.
    Raises AttarError for a format that the hardware has no rate of.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    for operation in counts.operations:
        seconds[operation.part] += _seconds(operation, hardware)
    return {**seconds, "total": sum(seconds.values())}


def _seconds(operation: Operation, hardware: Hardware) -> float:
    moving = operation.bytes / (hardware.bandwidth * hardware.efficiency["bandwidth"])
    if not operation.flops:
        return moving
    shares = hardware.efficiency
    if operation.part == "attention":
        share = shares["attention"]
    elif operation.part == "transform":
        share = shares.get("rotation", shares["gemm"])
    else:
        share = shares.get(operation.format, shares["gemm"])
    rate = hardware.rate(operation.format)
    if operation.part == "transform":  # attar's rotations take float32 where that is faster
        rate = max(rate, hardware.rates.get("fp32", 0.0))
    arithmetic = operation.flops / (rate * share)
    return max(moving, arithmetic)


def execution_format(plan: LayerPlan, hardware: Hardware, dense: str) -> str:
    """The arithmetic that a planned linear runs in: "int8", "int8-few", "fp8", or the model's own.

    Weights without quantized activations are expanded and multiplied in the model's format, and so are factors of two
    kinds. Integers of all widths are multiplied as bytes, also where the hardware knows int4, for which attar has no
    kernels.
    """
    if plan.weight_bits is None or plan.act_bits is None:
        return dense
    if plan.numbers == ("fp8", "fp8"):
        return "fp8" if "fp8" in hardware.rates else dense
    if plan.numbers not in INTEGERS:
        return dense
    if plan.row_bits is not None and any(
        grid.stored != "int" for grid in plan.row_bits.grids(plan.weight_bits, plan.weight_format)
    ):
        return dense  # some rows are
    if plan.weight_bits + plan.act_bits <= FEW_BITS and "int8-few" in hardware.rates:
        return "int8-few"
    return "int8" if "int8" in hardware.rates else dense


def quantized_counts(
    counts: Counts, plans: Iterable[LayerPlan], transforms: TransformSettings, hardware: Hardware
) -> Counts:
    """The counts of the transformer after a recipe.

    Planned linears read packed weights, and integer activations where these are quantized. Before each such linear
    comes a "transform": its channel scale and rotation, and the quantization of rows, one pass that reads the input
    and writes its codes, or its values where they stay in floating point. Each linear has its own, since each learns
    its own transforms; plain ones have none. A low-rank branch is two more products, in the model's format.
    """
    known = {plan.name: plan for plan in plans if not plan.skipped}
    as_products = "rotation" in hardware.efficiency
    found: list[Operation] = []
    for operation in counts.operations:
        plan = known.get(operation.name) if operation.part == "linear" else None
        if plan is None or plan.weight_bits is None:
            found.append(operation)
            continue
        width = plan.in_features
        calls = operation.weights / max(1.0, _dense_bytes(plan, operation))
        packed = calls * weight_bytes(plan)
        inputs = operation.read - operation.weights
        format = execution_format(plan, hardware, operation.format)
        transformed = plan.transformed and (transforms.scale or transforms.rotation != "none")
        if plan.act_bits is not None or transformed:
            written = inputs
            if plan.act_bits is not None:
                bits = {"int8": 1.0, "int8-few": 1.0, "fp8": 1.0}.get(
                    format, inputs / max(1.0, operation.rows * width)
                )
                written = operation.rows * (width * bits + 4)
            found.append(
                replace(
                    operation, part="transform", role="quantize", read=inputs, written=written, weights=0.0,
                    flops=operation.rows * _rotation_flops(width, transforms.rotation, as_products),
                )
            )  # fmt: skip
            inputs = written
        found.append(replace(operation, format=format, read=inputs + packed, weights=packed))
        if plan.low_rank:
            found.append(_branch(operation, plan, calls))
    return Counts(tuple(found), counts.blocks)


def _branch(operation: Operation, plan: LayerPlan, calls: float) -> Operation:
    """Both products of a low-rank branch, which reads the input as it comes and adds to the output."""
    size = 4 if operation.format == "fp32" else 2
    weights = calls * size * plan.low_rank * (plan.in_features + plan.out_features)
    return replace(
        operation, role="low-rank branch", weights=weights,
        flops=2.0 * operation.rows * plan.low_rank * (plan.in_features + plan.out_features),
        read=operation.read - operation.weights + operation.written + weights,
    )  # fmt: skip


def _dense_bytes(plan: LayerPlan, operation: Operation) -> float:
    size = {"fp32": 4, "fp64": 8}.get(operation.format, 2)
    return size * (plan.in_features * plan.out_features + (plan.out_features if plan.bias else 0))


def _rotation_flops(width: int, rotation: str, as_products: bool) -> float:
    """Of one row; of an adaptive rotation those that are expected, as in `forecast` of plan.py. as_products: on
    hardware that rotates with matrix products, where a Hadamard matrix comes apart in two factors."""
    if rotation == "hadamard" and not as_products:
        return width * math.log2(width)
    if rotation in ("kronecker", "hadamard"):
        return 2.0 * width * sum(kronecker_factors(width))
    if rotation == "orthogonal":
        return 2.0 * width * width
    if rotation == "adaptive":
        dual = 4.0 * width * block_width(width)
        return SALIENT_SHARE * dual + (1 - SALIENT_SHARE) * _rotation_flops(width, "hadamard", as_products)
    return 0.0


def arithmetic_bound(before: Counts, after: Counts, hardware: Hardware) -> float:
    """The speed-up with perfect kernels that are bound by arithmetic alone: no traffic, nothing added.

    Raises AttarError for a format that the hardware has no rate of.
    """

    def seconds(counts: Counts) -> float:
        return sum(
            o.flops / hardware.rate(o.format) for o in counts.operations if o.flops and o.part != "transform"
        )

    return seconds(before) / seconds(after)


def amdahl(counts: Counts, faster: Mapping[str, float], only: Iterable[str] | None = None) -> float:
    """The speed-up of the whole when parts run so many times faster, by floating-point operations alone.

    faster: {"linear": 2.0, "attention": inf}. only: names of the linears that are meant; default: all. Perfect
    kernels, nothing added, everything else unchanged: no implementation can pass it.
    """
    chosen = None if only is None else set(only)
    total = after = 0.0
    for operation in counts.operations:
        total += operation.flops
        meant = operation.part != "linear" or chosen is None or operation.name in chosen
        after += operation.flops / (faster.get(operation.part, 1.0) if meant else 1.0)
    return total / after if after else math.inf
