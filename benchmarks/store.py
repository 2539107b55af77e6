"""Result files: read whole, written whole, so that a benchmark that is stopped keeps what it has."""

from __future__ import annotations

import contextlib
import json
import platform
import re
from pathlib import Path
from typing import Any

from attar.files import writing

FOLDER = Path(__file__).parent / "results"


def load(path: Path, *sections: str) -> dict[str, Any]:
    """What the file holds; without one, every section empty."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {name: {} for name in sections}


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes the file, which appears whole or not at all; one line for each value, so that versions compare well."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=0) + "\n", encoding="utf-8")


def failure(error: Exception) -> dict[str, str]:
    """An error as a result: its kind and the start of its text, without paths, which are of one machine only."""
    text = re.sub(r"(?<!\S)/\S+", "…", " ".join(str(error).split()))
    return {"error": f"{type(error).__name__}: {text[:200]}"}


def file_of(benchmark: str, device: str) -> str:
    """Name of the results file of a benchmark on a device, as in gpu-nvidia-h200.json."""
    return f"{benchmark}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def processor() -> str:
    """The CPU's name, and "AVX2" where it has that and nothing wider: one name may stand for several generations."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        flags = found.get("flags", "").split()
        if "model name" in found:
            return found["model name"] + (", AVX2" if "avx2" in flags and "avx512f" not in flags else "")
    return platform.processor() or platform.machine()
