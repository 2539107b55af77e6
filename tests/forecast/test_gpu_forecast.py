"""The forecast beside what was measured on a GPU: linears of real models, one by one."""

from __future__ import annotations

import json

import pytest

from attar.forecast.counts import Counts, Operation
from attar.forecast.hardware import find_hardware
from attar.forecast.latency import predict_latency
from benchmarks.gpu import results_path

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
    content = json.loads(results_path("NVIDIA H200").read_text(encoding="utf-8"))
    for title, study in content["studies"].items():
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
