"""The forecast beside what was measured on a GPU: linears of real models, one by one, and whole blocks."""

from __future__ import annotations

import json

import pytest

from attar.bench.subject import latent_grid
from attar.forecast.architecture import find_architecture
from attar.forecast.calls import transformer_call
from attar.forecast.counts import Counts, Operation, count_transformer
from attar.forecast.hardware import find_hardware
from attar.forecast.latency import predict_latency, quantized_counts
from attar.planning import plan_components
from attar.recipe import load_recipe
from attar.settings import transform_settings
from benchmarks.gpu import results_path

CONTENT = json.loads(results_path("NVIDIA H200").read_text(encoding="utf-8"))
FORMATS = {"bf16": "bf16", "attar rtn W8A8": "int8", "attar rtn W4A8": "int8", "attar fp8": "fp8"}


def forecast(tokens: int, size: tuple[int, int], format: str) -> float:
    """Seconds of one linear, with the quantization of its rows where these are quantized."""
    (wide, out), byte = size, 2 if format == "bf16" else 1
    product = Operation(
        "linear", "blocks.0.linear", "linear", "blocks.0", format, flops=2.0 * tokens * wide * out,
        read=byte * wide * (tokens + out), written=2.0 * tokens * out,
    )  # fmt: skip
    rows = Operation(
        "transform",
        "blocks.0.linear",
        "quantize",
        "blocks.0",
        "fp32",
        0.0,
        2.0 * tokens * wide,
        tokens * wide,
    )
    operations = (product,) if format == "bf16" else (rows, product)
    return predict_latency(Counts(operations, ("blocks.0",)), find_hardware("h200"))["total"]


def measured():
    for title, study in CONTENT["studies"].items():
        for part, rows in study["linears"].items():
            wide, out = map(int, part.split()[-1].split("->"))
            for name, format in FORMATS.items():
                tokens = int(title.split()[-2])
                yield pytest.param(
                    tokens, (wide, out), format, rows[name]["seconds"], id=f"{title}, {part}, {name}"
                )


@pytest.mark.parametrize("tokens, size, format, seconds", list(measured()))
def test_linears_on_an_h200(tokens, size, format, seconds):
    assert forecast(tokens, size, format) == pytest.approx(seconds, rel=0.1 if format == "bf16" else 0.25)


# a block in a CUDA graph, which launches nothing from Python; HunyuanVideo's attention has a mask, and is slower
TOLERANCE = {"wan-1.3b": 0.2, "wan-14b": 0.1, "hunyuan": 0.3}
RECIPES = {
    "bf16": None, "attar rtn W8A8": ("rtn", 8, 8), "attar rtn W4A8": ("rtn", 4, 8), "attar fp8": ("fp8", 8, 8),
    "attar hadamard W4A8": ("hadamard", 4, 8),
}  # fmt: skip


@pytest.mark.parametrize("shape", TOLERANCE)
def test_blocks_on_an_h200(shape):
    architecture, hardware = find_architecture(shape), find_hardware("h200")
    name, transformer = next(iter(architecture.transformers.items()))
    timed = {title: study.get("graph", {}) for title, study in CONTENT["studies"].items() if shape in title}
    assert sum(map(len, timed.values())) >= len(RECIPES)
    for title, rows in timed.items():
        grid = latent_grid(architecture, int(title.split()[-2]))
        whole = count_transformer(transformer, transformer_call(architecture, name, grid, 512))
        first = next(iter(whole.blocks))
        dense = whole.where(lambda o, first=first: o.block == first)
        for row in rows:
            counts = dense
            if given := RECIPES[row]:
                recipe = load_recipe(given[0], {"quantize.weights": given[1], "quantize.acts": given[2]})
                plans = plan_components({name: transformer}, recipe)[name]
                counts = quantized_counts(dense, plans, transform_settings(recipe), hardware)
            seconds = predict_latency(counts, hardware)["total"]
            assert seconds == pytest.approx(rows[row]["seconds"], rel=TOLERANCE[shape]), (title, row)
