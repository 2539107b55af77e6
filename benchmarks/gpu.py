"""Speed and memory of packed layers on a GPU, beside cuBLAS and torchao, on the shapes of real models.

    python -m benchmarks.gpu                                 # Wan-1.3B, Wan-14B, HunyuanVideo at 8k and 32k tokens
    python -m benchmarks.gpu --shapes wan-14b --tokens 8192  # a part; what was measured before is kept
    python -m benchmarks.gpu --parts linears --only attar    # some competitors, beside bf16
    python -m benchmarks.gpu --table                         # what was measured, without a GPU

Every linear of a block by itself, its calls captured in a CUDA graph, so that a rate is the device's and not Python's;
and a whole block, as it is called, and in a CUDA graph too. All competitors run in turns, so that the clock of the GPU
touches all alike; those of a later run with --only are compared with that run's own bf16, and the first one's is kept.
The results lie in benchmarks/results/gpu-<device>.json, with the versions of everything.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attar import __version__
from attar.forecast.architecture import find_architecture
from attar.models.adapter import ModelAdapter
from attar.runtime import PackedLinear, backend_description
from attar.runtime.formats import encode
from attar.runtime.reference import symmetric_scale
from benchmarks.peers.competitors import BF16, INT8_DYNAMIC, Competitor, Task, attar, plain, torchao
from benchmarks.peers.quality import linear_bytes
from benchmarks.peers.speed import BASELINE, Ready, in_turns, measure_speed
from benchmarks.store import FOLDER, failure, file_of, load, save

SHAPES = ("wan-1.3b", "wan-14b", "hunyuan")
TOKENS = (8192, 32768)
REPEATS = 10  # calls in one CUDA graph
TITLES = {"block": "whole block", "graph": "whole block, CUDA graph"}
PARTS = ("linears", *TITLES)
FP8 = torchao(lambda q: q.Float8DynamicActivationFloat8WeightConfig())
COMPETITORS = (
    Competitor("bf16", "torch", plain, BF16),
    Competitor("attar rtn W8A8", "attar", attar("rtn", 8, 8), BF16),
    Competitor("attar rtn W4A8", "attar", attar("rtn", 4, 8), BF16),
    Competitor("attar rtn W4A16", "attar", attar("rtn", 4, 16), BF16),
    Competitor("attar fp8", "attar", attar("fp8", 8, 8), BF16),
    Competitor("attar hadamard W4A8", "attar", attar("hadamard", 4, 8), BF16),
    Competitor("attar attar-ptq W4A6", "attar", attar("attar-ptq", 4, 6), BF16),
    Competitor("bf16, compiled", "torch", plain, BF16, compiled=True),
    Competitor("attar compiled rtn W4A8", "attar", attar("rtn", 4, 8), BF16, compiled=True),
    Competitor("torchao int8 dynamic", "torchao", INT8_DYNAMIC, BF16, compiled=True),
    Competitor("torchao fp8 dynamic", "torchao", FP8, BF16, compiled=True),
)


def linear_shapes(shape: str) -> dict[str, tuple[int, int]]:
    """Role and size -> (in, out) of the linears that tokens pass in the blocks; one role for those of equal size."""
    transformer = next(iter(find_architecture(shape).transformers.values()))
    adapter = ModelAdapter.of(transformer)
    found: dict[tuple[int, int], str] = {}
    for block in adapter.blocks:
        for linear in adapter.linears(block):
            if linear.role == "modulation":  # a single row
                continue
            module: Any = linear.module
            found.setdefault((module.in_features, module.out_features), linear.role)
    return {f"{role} {size[0]}->{size[1]}": size for size, role in found.items()}


class OneLinear(nn.Module):
    """A linear under a name that every competitor takes for one in a block."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([linear])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def measure_linear(
    competitors: tuple[Competitor, ...], size: tuple[int, int], tokens: int, rounds: int, device: str
) -> dict[str, dict[str, Any]]:
    """Seconds of one call, operations a second, times faster than bf16, bytes; or the error."""
    ready: dict[str, Ready] = {}
    found: dict[str, dict[str, Any]] = {}
    for competitor in competitors:
        try:
            ready[competitor.name] = _prepare(competitor, size, tokens, device)
        except Exception as error:
            found[competitor.name] = failure(error)
    for name, row in in_turns(ready, rounds, device).items():
        row["seconds"] /= REPEATS
        row["tera_operations"] = 2e-12 * tokens * size[0] * size[1] / row["seconds"]
        found[name] = row
    return {c.name: found[c.name] for c in competitors}


def _prepare(competitor: Competitor, size: tuple[int, int], tokens: int, device: str) -> Ready:
    torch.manual_seed(0)
    linear = nn.Linear(*size, device=device, dtype=competitor.dtype)
    x = torch.randn(tokens, size[0], device=device, dtype=competitor.dtype)

    def compress(recipe: str, weights: int, acts: int) -> nn.Module:
        if recipe not in ("rtn", "fp8"):
            raise ValueError("transforms are measured in whole blocks")
        number = "fp8" if recipe == "fp8" else "int"
        return OneLinear(rounded(linear, weights, None if acts == 16 else acts, number))

    with torch.no_grad():
        module = competitor.make(Task(OneLinear(linear), [{"x": x}], compress))
        if competitor.compiled:
            module = torch.compile(module)
        return Ready(captured(lambda: module(x), device), linear_bytes(module))


def rounded(linear: nn.Linear, weights: int, acts: int | None, number: str = "int") -> PackedLinear:
    """The linear, rounded to nearest. Uniformly random codes would draw more power, and so run slower, than real ones.

    number: the format of both factors.
    """
    scale = symmetric_scale(linear.weight.detach().abs().amax(1, keepdim=True), weights, number)
    codes = encode(linear.weight.detach().float() / scale, number, weights)
    bias = None if linear.bias is None else linear.bias.detach()
    formats = {"weight_format": number, "act_format": "int" if acts is None else number}
    return PackedLinear.from_codes(codes, scale, weights, bias, acts, **formats)


@torch.no_grad()
def captured(run: Callable[[], object], device: str) -> Callable[[], object]:
    """REPEATS calls as one: on CUDA a graph, after calls in which kernels are compiled and tuned."""
    if torch.device(device).type != "cuda":
        return lambda: [run() for _ in range(REPEATS)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()

    def replay(tensors_of: Callable[[], object] = run) -> None:  # a graph does not keep what it reads alive
        graph.replay()

    return replay


def measure_block(
    part: str, competitors: tuple[Competitor, ...], shape: str, tokens: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds of a whole block, times faster than bf16, bytes of its linears; or the error. part: of TITLES."""
    if part == "block":
        return measure_speed(competitors, shape, tokens, rounds, "cuda")
    found = measure_speed(competitors, shape, tokens, rounds, "cuda", lambda run: captured(run, "cuda"))
    for row in found.values():
        if "seconds" in row:
            row["seconds"] /= REPEATS
    return found


def wanted(names: list[str] | None, part: str) -> tuple[Competitor, ...]:
    """The competitors whose name holds one of `names`, all for None, and bf16. Linears: as they are called alone."""
    found = [
        c for c in COMPETITORS if not names or c.name == BASELINE or any(name in c.name for name in names)
    ]
    if part == "linears":
        found = [c for c in found if not {"hadamard", "attar-ptq", "compiled"} & set(c.name.split())]
    return tuple(found)


def table(content: dict[str, Any]) -> str:
    """The results for people, one table for a model at a length."""
    lines = [f"{content['device']}; {content['backend']}; {', '.join(content['versions'].values())}"]
    for title, study in content["studies"].items():
        lines += ["", f"## {title}", "", "| | what | ms | T operations/s | times faster than bf16 | bytes |"]
        lines.append("|---|---|---|---|---|---|")
        blocks = {text: study.get(part, {}) for part, text in TITLES.items()}
        for part, rows in {**study["linears"], **blocks}.items():
            whole = rows.get("bf16", {}).get("bytes")
            order = [c.name for c in COMPETITORS if c.name in rows]
            order += [name for name in rows if name not in order]
            lines += [f"| {part} | {name} | {_cells(rows[name], whole)} |" for name in order]
    return "\n".join(lines)


def _cells(row: dict[str, Any], whole: int | None) -> str:
    if "error" in row:
        return row["error"].replace("|", "/")[:120] + " | | |"
    rate, f = row.get("tera_operations"), row.get("faster")
    cells = [
        f"{1000 * row['seconds']:.3f}",
        "" if rate is None else f"{rate:.0f}",
        "" if f is None else f"{f['value']:.2f} ({f['low']:.2f} – {f['high']:.2f})",
        f"{row['bytes'] / 1e6:.1f} MB" + ("" if not whole else f" ({row['bytes'] / whole:.3f}×)"),
    ]
    return " | ".join(cells)


def results_path(device_name: str) -> Path:
    return FOLDER / file_of("gpu", device_name)


def versions() -> dict[str, str]:
    """Name -> "name version" of what the figures depend on."""
    found = {"attar": f"attar {__version__}", "torch": f"torch {torch.__version__}"}
    for name in ("triton", "torchao"):
        try:
            found[name] = f"{name} {version(name)}"
        except PackageNotFoundError:
            found[name] = f"{name} not installed"
    return found


def main() -> None:
    """Measures what is asked for and puts it into the results of this device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", metavar="WORD", help="competitors whose names hold one of these")
    parser.add_argument(
        "--table", action="store_true", help="only print what was measured before, on any device"
    )
    arguments = parser.parse_args()
    if arguments.table:
        print("\n\n".join(table(load(path)) for path in sorted(FOLDER.glob("gpu-*.json"))))
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu measures a CUDA device, and this machine has none.")
    name = torch.cuda.get_device_name()
    path = results_path(name)
    content = load(path, "studies")
    content |= {"device": name, "backend": backend_description("cuda"), "versions": versions()}
    for part in arguments.parts:
        competitors = wanted(arguments.only, part)
        for shape in arguments.shapes:
            sizes = linear_shapes(shape) if part == "linears" else {TITLES[part]: None}
            for (unit, size), tokens in itertools.product(sizes.items(), arguments.tokens):
                started = time.perf_counter()
                title = f"{shape}, {tokens} tokens"
                study = content["studies"].setdefault(title, {"linears": {}})
                if size is None:
                    kept = study.setdefault(part, {})
                    found = measure_block(part, competitors, shape, tokens, arguments.rounds)
                else:
                    kept = study["linears"].setdefault(unit, {})
                    found = measure_linear(competitors, size, tokens, arguments.rounds, "cuda")
                if arguments.only and kept.get(BASELINE):
                    del found[BASELINE]  # others were measured beside the one that is there
                kept.update(found)
                save(path, content)
                torch.cuda.empty_cache()
                seconds = time.perf_counter() - started
                print(f"{title}, {unit}: {seconds:.0f} s", file=sys.stderr, flush=True)
    print(table(content))


if __name__ == "__main__":
    main()
