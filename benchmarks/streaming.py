"""Compression of a model that is larger than the memory it takes: peak RSS, time and sizes, as JSON.

    python -m benchmarks.streaming                     # CogVideoX-5B's configuration, random weights, all cells
    python -m benchmarks.streaming --cells hadamard    # some cells; the others stay in the file as they are

Every command runs in a process of its own, whose peak resident memory the operating system reports when it ends. This
process stays small and imports no torch, since a child inherits the peak of the process that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LAYERS = 42
RESULTS = Path(__file__).parent / "results" / "streaming.json"
FEW = ["--set", "trace.prompts=1", "--set", "trace.steps=2", "--set", "select.count=2"]
CELLS: dict[str, tuple[list[str], float]] = {  # arguments of attar compress, bar in GB
    "rtn": (["--recipe", "rtn", "--weights", "8", "--acts", "8"], 3.0),
    "hadamard": (["--recipe", "hadamard", "--weights", "4", "--acts", "8"], 3.0),
    "smoothquant": (["--recipe", "smoothquant", "--weights", "8", "--acts", "8", *FEW], 6.0),
    "learned-base": (["--recipe", "learned-base", "--weights", "4", "--acts", "6", *FEW,
                      "--set", "reconstruct.epochs=1"], 6.0),
}  # fmt: skip


def measure(command: list[str], log: Path) -> dict[str, float]:
    """Runs a command; its peak resident memory in GB (10^9 bytes) and its seconds."""
    started = time.monotonic()
    with open(log, "wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed; the end of {log}:\n" + log.read_text()[-2000:])
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "peak_gb": round(usage.ru_maxrss * unit / 1e9, 3),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }


def device() -> str:
    """What the figures were measured on."""
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, OMP_NUM_THREADS={threads}"


def folder_gb(folder: Path) -> float:
    """Size of the weights of the transformer in GB."""
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9, 3)


def run(cells: list[str], place: Path, layers: int) -> dict[str, Any]:
    """Makes the model and runs the cells on it, one after the other."""
    model = place / "model"
    if not model.exists():
        made = measure(
            [sys.executable, "-m", "benchmarks.big_model", str(model), "--layers", str(layers)],
            place / "model.log",
        )
        print("model", made, flush=True)
    rows = {}
    for name in cells:
        arguments, bar = CELLS[name]
        out = place / name
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(place / f"{name}.work", ignore_errors=True)
        command = ["attar", "compress", "MODEL", "--stream", "-o", "OUT", *arguments]
        real = [{"MODEL": str(model), "OUT": str(out)}.get(word, word) for word in command[1:]]
        row = measure([sys.executable, "-m", "attar", *real], place / f"{name}.log")
        key = name if layers == LAYERS else f"{name}, {layers} of {LAYERS} blocks"
        rows[key] = {
            **row, "bar_gb": bar, "command": " ".join(command), "transformer_gb": folder_gb(out / "transformer"),
            "source_gb": folder_gb(model / "transformer"),
        }  # fmt: skip
        print(key, rows[key], flush=True)
        shutil.rmtree(out)
        shutil.rmtree(place / f"{name}.work")
    return rows


def table(content: dict[str, Any]) -> str:
    """The results as the table of docs/compress.md."""
    rows = [
        "| recipe | peak memory | bar | transformer | time | CPU time |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in content["cells"].items():
        rows.append(
            f"| `{row['command'].removeprefix('attar compress MODEL --stream -o OUT ')}` "
            f"{name.partition(', ')[2]} | {row['peak_gb']:.2f} GB | {row['bar_gb']:g} GB "
            f"| {row['source_gb']:.2f} → {row['transformer_gb']:.2f} GB | {row['seconds'] / 60:.0f} min "
            f"| {row['cpu_seconds'] / 60:.1f} min |"
        )
    return "\n".join([*rows, "", f"{content['device']}; {content['model']}"])


def main() -> None:
    """Runs the cells that are asked for and puts them into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer make a smaller model")
    parser.add_argument("--place", type=Path, help="folder for model and results (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attar-streaming-") as temporary:
        place = arguments.place or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        rows = run(arguments.cells, place, arguments.layers)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    content = {
        "model": "CogVideoX-5B's configuration, random bfloat16 weights; stand-ins for text encoder and autoencoder",
        "device": device(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors")},
        "cells": {**known.get("cells", {}), **rows},
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))


if __name__ == "__main__":
    main()
