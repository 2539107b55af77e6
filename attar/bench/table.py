"""The result of `attar bench` for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from attar.bench.run import BASELINE, PACKED


def print_bench(result: dict[str, Any]) -> None:
    """Tables of every kind of block, then sizes, memory and the blocks of one step."""
    console = Console()
    console.print(f"[bold]{result['model']}[/bold], {result['what']}")
    console.print(f"{result['tokens']} tokens, {result['device']}, {result['threads']} threads")
    console.print(f"backend {result['backend']}")
    for block in result["blocks"]:
        table = Table(title=f"{block['block']} (x{block['count']}), ms", title_justify="left")
        for name in ("part", result["baseline"], "packed", "times faster", "middle half of the rounds"):
            table.add_column(name, justify="left" if name == "part" else "right")
        for row in [*block["parts"], block["transforms"], block["linears"], block["whole"]]:
            last = row["part"] in ("linears", "whole")
            table.add_row(*_cells(row), style="bold" if last else None)
        console.print(table)
    step, weights = result["step_seconds"], result["weight_bytes"]
    console.print(
        f"blocks of one forward: {step[BASELINE]:.2f} s {result['baseline']}, {step[PACKED]:.2f} s packed, "
        f"[bold]{step['ratio']:.2f}x[/bold]"
    )
    limit = result["linears_limit"]
    console.print(
        f"a large product alone: {limit['dense_rate'] / 1e9:.0f} GOP/s {result['baseline']}, "
        f"{limit['packed_rate'] / 1e9:.0f} W{limit['bits'][0]}A{limit['bits'][1]}, {limit['faster']['value']:.2f}x; "
        f"the linears reach [bold]{limit['reached']:.0%}[/bold] of that ratio"
    )
    console.print(
        f"weights of the blocks' linears: {_megabytes(weights[BASELINE])} {result['baseline']}, "
        f"{_megabytes(weights[PACKED])} packed, [bold]{weights['share']:.3f}x[/bold]"
    )
    if result["disk_bytes"] is not None:
        sizes = ", ".join(f"{name} {_megabytes(size)}" for name, size in result["disk_bytes"].items())
        console.print(f"on disk: {sizes}")
    console.print(f"peak memory of this run: {_megabytes(result['peak_memory'])}")


def _cells(row: dict[str, Any]) -> list[str]:
    seconds, faster = row["seconds"], row.get("faster")
    times = [f"{1000 * seconds[name]:.2f}" for name in (BASELINE, PACKED)]
    if faster is None:
        return [row["part"], *times, "–", "–"]
    return [row["part"], *times, f"{faster['value']:.2f}", f"{faster['low']:.2f} – {faster['high']:.2f}"]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
