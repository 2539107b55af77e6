"""Imports run one way, and `import attar` stays lean."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import attar

ROOT = Path(attar.__file__).parent
VERBS = {"calibration", "quantize"}
CONDUCTING = {
    "allocation",
    "measuring",
    "candidates",
    "planning",
    "conductor",
    "component",
    "pool",
    "finetuning",
    "job",
    "traced",
    "samples",
    "assemble",
    "text_encoder",
    "settings",
    "stored",
    "synthesis",
    "save",
    "forecast",
    "bench",
    "recipe",
    "workspace",
    "identity",
    "cli",
}

# part -> the parts of attar that it may import; every part may import itself, errors, files and tensorfile
ALLOWED = {
    "losses": set(),
    "runtime": set(),
    "memory": set(),
    "models": {"memory", "runtime"},
    "ranks": set(),
    "calibration": {"models", "losses", "ranks"},
    "quantize": {"models", "losses", "ranks", "runtime"},
    "evaluate": {"models", "runtime", "progress"},
    "budget": {"models", "quantize", "ranks"},
    "stages": {"budget", "calibration", "quantize", "runtime"},
    "defaults": set(),
    "recipe": {"budget", "defaults", "quantize", "stages"},
    "job": {"calibration", "models", "progress", "quantize", "recipe", "runtime", "workspace"},
    "planning": {"budget", "models", "quantize", "recipe", "runtime", "settings"},
    "candidates": {"budget", "planning", "recipe", "settings"},
    "measuring": {
        "budget",
        "calibration",
        "models",
        "progress",
        "quantize",
        "ranks",
        "recipe",
        "runtime",
        "samples",
        "settings",
        "synthesis",
        "workspace",
    },
    "allocation": {
        "budget",
        "calibration",
        "candidates",
        "measuring",
        "planning",
        "progress",
        "quantize",
        "ranks",
        "recipe",
        "workspace",
    },
    "workspace": {"memory", "ranks"},
    "identity": {"models"},
    "progress": set(),
    "assemble": {"models", "runtime", "stored", "workspace"},
    "stored": {"models", "quantize", "ranks", "runtime", "workspace"},
    "settings": {"quantize", "recipe"},
    "samples": {*VERBS, "models", "ranks", "runtime", "workspace"},
    "synthesis": {"calibration", "models", "progress", "ranks", "samples", "stages", "workspace"},
    "component": {
        *VERBS,
        "job",
        "losses",
        "models",
        "progress",
        "ranks",
        "recipe",
        "runtime",
        "samples",
        "settings",
        "stored",
        "synthesis",
        "workspace",
    },
    "traced": {"calibration", "models", "progress", "samples", "workspace"},
    "finetuning": {
        *VERBS,
        "component",
        "job",
        "losses",
        "models",
        "progress",
        "ranks",
        "recipe",
        "runtime",
        "settings",
        "stored",
        "traced",
        "workspace",
    },
    "text_encoder": {
        *VERBS,
        "losses",
        "models",
        "progress",
        "recipe",
        "runtime",
        "stages",
        "stored",
        "workspace",
    },
    "pool": {*VERBS, "ranks", "recipe", "runtime", "samples"},
    "conductor": {
        *VERBS,
        "allocation",
        "budget",
        "candidates",
        "component",
        "finetuning",
        "identity",
        "models",
        "planning",
        "pool",
        "progress",
        "ranks",
        "recipe",
        "runtime",
        "settings",
        "stages",
        "synthesis",
        "text_encoder",
        "workspace",
    },
    "save": {
        *VERBS,
        "allocation",
        "assemble",
        "conductor",
        "evaluate",
        "models",
        "recipe",
        "runtime",
        "settings",
        "stored",
        "text_encoder",
        "workspace",
    },
    "forecast": {
        *VERBS,
        "candidates",
        "conductor",
        "evaluate",
        "finetuning",
        "losses",
        "models",
        "planning",
        "pool",
        "recipe",
        "runtime",
        "samples",
        "save",
        "settings",
        "text_encoder",
    },
    "bench": {
        "calibration",
        "candidates",
        "evaluate",
        "forecast",
        "models",
        "quantize",
        "recipe",
        "runtime",
        "settings",
    },
    "errors": set(),
    "files": set(),
    "tensorfile": set(),
    "__init__": {"calibration", "conductor", "models", "recipe", "runtime"},
    "__main__": {"cli"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of attar's modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "attar"}


def part_of(name: str) -> str:
    parts = name.split(".")
    known = len(parts) > 1 and ((ROOT / parts[1]).is_dir() or (ROOT / f"{parts[1]}.py").is_file())
    return parts[1] if known else "__init__"


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    relative = path.relative_to(ROOT)
    part = relative.parts[0].removesuffix(".py")
    if part == "cli":
        return
    assert part in ALLOWED, f"say in this test what {part} may import"
    allowed = {part, "errors"} | ({"files", "tensorfile"} if part != "losses" else set()) | ALLOWED[part]
    found = {part_of(name) for name in imports(path)} - (
        {"__init__"} if part == "save" else set()
    )  # __version__
    assert found <= allowed, f"{relative} imports {sorted(found - allowed)}"


def test_only_the_loader_of_models_and_the_form_of_convolutions_know_the_runtime():
    users = [
        p.name for p in (ROOT / "models").rglob("*.py") if any(part_of(n) == "runtime" for n in imports(p))
    ]
    assert sorted(users) == ["linears.py", "source.py"]


def test_verbs_do_not_know_each_other():
    for verb in VERBS:
        for path in (ROOT / verb).rglob("*.py"):
            assert not {part_of(n) for n in imports(path)} & (VERBS - {verb} | CONDUCTING), path


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("alike", {"models"}),
        ("counts", {"models", "forecast.alike"}),
        ("hardware", set()),
        ("latency", {"quantize", "runtime", "forecast.counts", "forecast.hardware"}),
        ("measure", {"runtime", "forecast.counts", "forecast.hardware"}),
    ],
)
def test_the_forecast_counts_without_plumbing(name, allowed):
    """What a benchmark calls with peaks of its own knows neither recipes nor pipelines nor printing."""
    used = {n.removeprefix("attar.") for n in imports(ROOT / "forecast" / f"{name}.py")}
    used = {n for n in used if part_of(f"attar.{n}") != "errors"}
    assert all(any(n.startswith(place) for place in allowed) for n in used), used


HEAVY = (
    "matplotlib",
    "sklearn",
    "typer",
    "jinja2",
    "imageio",
    "imageio_ffmpeg",
    "torchmetrics",
    "peft",
    "rich",
    "yaml",
    "triton",
)


def test_importing_attar_is_lean():
    """Of the heavy packages only what diffusers itself has already loaded."""
    code = f"""
import sys
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers import auto
before = {{m for m in {HEAVY} if m in sys.modules}}
import attar
after = {{m for m in {HEAVY} if m in sys.modules}}
print(sorted(after - before), [m for m in sys.modules if m.startswith("attar.quantize") or m == "attar.conductor"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


def test_public_names():
    assert all(getattr(attar, name) is not None for name in attar.__all__)
    assert len(attar.__all__) <= 12
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        attar.nothing  # noqa: B018
