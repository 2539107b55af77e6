"""The plan for people: tables and sentences on stdout."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from attar.evaluate.size import format_bytes

_PARTS = {"linear": "linears", "attention": "attention", "rest": "rest", "transform": "quantize, rotate"}


def print_plan(result: Mapping[str, Any]) -> None:
    """Prints what `plan_model` gives."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    size, hardware = result["size"], result["hardware"]
    branches = f"{result['branches']} branch{'es' if result['branches'] > 1 else ''} a step"
    console.print(
        f"{result['title']}, {size['width']}x{size['height']}x{size['frames']}, {size['text_tokens']} text tokens, "
        f"{result['steps']} steps, {branches}; {result['recipe']} {result['bits']} on {hardware['title']}\n"
    )
    console.print(_work(result), _times(result))
    speedup = result["speedup"]
    formats = ", ".join(f"{share:.0%} {name}" for name, share in result["formats"].items() if share >= 0.005)
    console.print(
        f"step {speedup['forecast']:.2f}× faster ({speedup['perfect_kernels']:.2f}× with perfect kernels); bound by "
        f"arithmetic {speedup['bound']:.2f}×, {speedup['linears_free']:.2f}× if linears were free; "
        f"quantized linears run in {formats}"
    )
    sizes, costs = result["bytes"], result["calibration"]
    console.print(
        f"transformer {format_bytes(sizes['block_linears_bf16'] + sizes['rest_bf16'])} → "
        f"{format_bytes(sizes['checkpoint'])} ({sizes['transformer_ratio']}×), "
        f"its block linears {sizes['linear_ratio']}×; text encoders and decoder stay as they are"
    )
    learn, trace, choosing = (costs[f"{part}_seconds"] for part in ("learn", "trace", "allocate"))
    time = "no calibration data needed"
    if whole := learn + trace + choosing:
        time = f"calibration about {_duration(whole)}, of which {_duration(trace)} tracing"
        time += f" and {_duration(choosing)} choosing bits" if choosing else ""
        time += f", blocks in {costs['precision']}"
    if result["budget"] is not None:
        time = f"bits by measured sensitivity, presumed here to keep to the budget {result['budget']}; {time}"
    console.print(
        f"{time}; peak {format_bytes(costs['device'])} on the device, {format_bytes(costs['host'])} of samples in main "
        "memory"
    )
    rates = ", ".join(f"{k} {_rate(v)}" for k, v in hardware["rates"].items())
    shares = ", ".join(f"{k} {v:.2f}" for k, v in hardware["efficiency"].items())
    console.print(
        f"peak FLOP/s: {rates}; {format_bytes(hardware['bandwidth'])}/s; reached in practice: {shares}\n"
    )
    for sentence in result["verdict"]:
        console.print(sentence)


def _work(result: Mapping[str, Any]) -> Table:
    table = _table("one denoising step", "FLOP", "share", "bytes moved")
    total = result["step"]["flops"]
    for part, name in (
        ("linear", "linears"),
        ("attention", "attention"),
        ("rest", "norms, elementwise, rest"),
    ):
        rows = [row for row in result["step"]["parts"] if row["part"] == part]
        sums = [sum(row[key] for row in rows) for key in ("flops", "bytes")]
        table.add_row(name, _flops(sums[0]), f"{sums[0] / total:.1%}", format_bytes(sums[1]))
        if part != "rest":
            for row in rows:
                table.add_row(
                    f"  {row['role']}",
                    _flops(row["flops"]),
                    f"{row['share']:.1%}",
                    format_bytes(row["bytes"]),
                )
    table.add_row("all", _flops(total), "", format_bytes(result["step"]["bytes"]), end_section=True)
    for name, row in result["around"].items():
        table.add_row(f"{name}, once", _flops(row["flops"]), "", format_bytes(row["bytes"]))
    return table


def _times(result: Mapping[str, Any]) -> Table:
    table = _table("forecast time", "bfloat16", result["bits"], "")
    before, after = (result["seconds_per_step"][k] for k in ("original", "recipe"))
    for part, name in _PARTS.items():
        if before[part] or after[part]:
            table.add_row(
                name, _seconds(before[part]), _seconds(after[part]), _ratio(before[part], after[part])
            )
    table.add_row("one step", *_pair(before["total"], after["total"]), end_section=True)
    once = 0.0
    for name, row in result["around"].items():
        once += row["seconds"]
        table.add_row(f"{name}, once", _seconds(row["seconds"]), _seconds(row["seconds"]), "")
    whole = [once + result["steps"] * part["total"] for part in (before, after)]
    table.add_row("one video" if result["size"]["frames"] > 1 else "one image", *_pair(*whole))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _pair(before: float, after: float) -> tuple[str, str, str]:
    return _seconds(before), _seconds(after), _ratio(before, after)


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}×" if before and after else ""


def _flops(value: float) -> str:
    return _scaled(value, ("", "k", "M", "G", "T", "P", "E"))


def _rate(value: float) -> str:
    return _scaled(value, ("", "k", "M", "G", "T", "P"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    place = 0
    while value >= 999.5 and place + 1 < len(units):
        value, place = value / 1000, place + 1
    return f"{value:.3g} {units[place]}".rstrip()


def _seconds(value: float) -> str:
    if not value:
        return "–"
    return f"{value * 1000:.3g} ms" if value < 1 else _duration(value)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
