"""What the figures mean, in sentences: above all where quantized linears alone cannot help, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attar.evaluate.size import format_bytes
from attar.forecast.hardware import FEW_BITS
from attar.quantize.plan import LayerPlan
from attar.runtime.backend import BACKENDS, INTEGERS, backend_description


def verdict(result: Mapping[str, Any], plans: Sequence[LayerPlan]) -> list[str]:
    """Sentences that hold for this plan, the most important first."""
    acting = [p for p in plans if p.weight_bits is not None and p.act_bits is not None]
    integers = [p for p in acting if p.numbers in INTEGERS]
    candidates = (
        _weight_only(result, acting) or _attention(result),
        _no_gain(result, integers),
        _formats(result, acting),
        _containers(result, integers),
        _fit(result),
        _backend(result),
    )
    return [sentence for sentence in candidates if sentence]


def _backend(result: Mapping[str, Any]) -> str:
    needed, hardware = "These times need kernels of the stated efficiency", result["hardware"]
    if hardware["name"] == "cpu":
        return f"{needed}; attar's backend today is {backend_description()}."
    # the machine that is asked about is not this one, so what works here says nothing
    names = [backend.name for backend in BACKENDS.values() if backend.device == "cuda"]
    if not names:
        return f"{needed}; attar has none for GPUs yet, its exact and slow reference would run there."
    return f"{needed}; attar's backend there is {names[0]}."


def _attention(result: Mapping[str, Any]) -> str | None:
    share, speedup = result["step"]["shares"]["attention"], result["speedup"]
    if share <= 0.5:
        return None
    return (
        f"Quantized linears alone cannot help much: attention is {share:.0%} of the arithmetic and stays as it is, so "
        f"the bound here is {speedup['bound']:.2f}×, and {speedup['linears_free']:.2f}× if linears cost nothing. "
        "Faster attention or fewer steps would."
    )


def _weight_only(result: Mapping[str, Any], acting: Sequence[LayerPlan]) -> str | None:
    if acting:
        return None
    if result["speedup"]["forecast"] < 1.05:
        return (
            "Weight-only formats multiply in the model's own format, and these steps are bound by arithmetic, not by "
            "reading weights: they save memory and no time."
        )
    return "Weight-only formats multiply in the model's own format: what they gain here is reading less."


def _no_gain(result: Mapping[str, Any], acting: Sequence[LayerPlan]) -> str | None:
    if acting and "int8" not in result["hardware"]["rates"]:
        return "No rate of integer products is known for this hardware, so the linears run in the model's own format."
    forecast, bound = result["speedup"]["forecast"], result["speedup"]["bound"]
    if acting and forecast < 1:
        return (
            f"The forecast is a slow-down ({forecast:.2f}×): quantizing and rotating every input in passes of "
            f"their own costs more than the linears gain; only kernels that fuse them come near {bound:.2f}×."
        )
    return None


def _formats(result: Mapping[str, Any], acting: Sequence[LayerPlan]) -> str | None:
    rates = result["hardware"]["rates"]
    kinds = {p.numbers for p in acting} - INTEGERS
    kinds -= {("fp8", "fp8")} if "fp8" in rates else set()
    if not kinds:
        return None
    named = " and ".join(f"{weights} weights with {acts} activations" for weights, acts in sorted(kinds))
    return (
        f"{result['hardware']['title']} has no arithmetic for {named}: such linears are multiplied in the model's own "
        "format, which saves memory and no time."
    )


def _containers(result: Mapping[str, Any], acting: Sequence[LayerPlan]) -> str | None:
    rates, title = result["hardware"]["rates"], result["hardware"]["title"]
    if "int8" not in rates or not acting:
        return None
    faster = rates.get("int8-few", 0.0) / rates["int8"]
    if faster > 1.1 and any((p.weight_bits or 8) + (p.act_bits or 8) <= FEW_BITS for p in acting):
        return (
            f"{title} multiplies codes of few bits, of both factors together at most {FEW_BITS}, {faster:.2f} times as "
            "fast as those of eight: they gain time, not only bytes."
        )
    if all(max(p.weight_bits or 0, p.act_bits or 0) <= 4 for p in acting):
        why = "multiplies 4-bit floats, not integers" if "fp4" in rates else "has no int4 arithmetic"
        if "int4" in rates:
            why = "multiplies int4, attar's kernels do not"
        return f"{title} {why}: {result['bits']} runs in int8, no faster than W8A8; it gains bytes, not time."
    odd = sorted({p.act_bits for p in acting if p.act_bits not in (4, 8) and p.act_bits})
    if odd:
        bits = " and ".join(map(str, odd))
        return f"Activations of {bits} bits run in int8 containers: no faster than W8A8, whatever the weights' bits."
    if any((p.weight_bits or 8) < 8 for p in acting):
        return (
            "Weights below 8 bits are widened to int8 for the product: they gain bytes, not time, over W8A8."
        )
    return None


def _fit(result: Mapping[str, Any]) -> str | None:
    costs, memory = result["calibration"], result["hardware"]["memory"]
    needed, streamed = costs["device"], costs["streamed"]
    if memory is None or needed <= memory:
        return None
    if streamed is not None and streamed <= memory:
        return (
            f"Calibration at this size needs about {format_bytes(needed)} with the whole pipeline on the device, which "
            f"has {format_bytes(memory)}, and {format_bytes(streamed)} with attar compress --stream."
        )
    does_not = f"Calibration at this size does not fit: about {format_bytes(needed)} on a device with "
    does_not += format_bytes(memory)
    checkpointed = costs["checkpointed"]
    if checkpointed is None:
        return (
            f"{does_not}; calibrate at fewer frames or a lower resolution, --frames, --height and --width of attar "
            "compress, or take a recipe without data."
        )
    if checkpointed < needed:
        does_not += f", and {format_bytes(checkpointed)} with --set finetune.gradient_checkpointing=true"
    if checkpointed <= memory:
        return f"{does_not}."
    return f"{does_not}; a smaller finetune.batch_size, fewer frames or a lower resolution take less."
