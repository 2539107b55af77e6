"""What a machine can do: peak rates by number format, memory bandwidth, and the share of both that kernels reach.

Figures of accelerators are in `hardware.yaml`, each with its source. Those of the CPU are measured here and now by
`attar.forecast.measure`, or given by the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

import yaml

from attar.errors import AttarError

KINDS = ("gemm", "attention", "bandwidth")
RATES = ("fp32", "bf16", "fp8", "int8", "int8-few", "int4", "fp4")
FEW_BITS = 13  # of both factors together, up to which products run at the rate "int8-few" where there is one


@dataclass(frozen=True)
class Hardware:
    """rates: FLOP/s (integer operations likewise) by format; "int8-few" is that of bytes that hold codes of few bits,
    which some processors multiply faster. bandwidth: bytes/s. memory: bytes, None where unknown.

    efficiency: share of the peak that is reached in practice, by kind: "gemm", "attention", "bandwidth"; under a format
    the share of its products, and under "rotation" that of rotations, where these are other than that of "gemm".
    sources: where each figure is from. packed_attention: the share that packed models' attention reaches, where they
    bring one of their own.
    """

    name: str
    title: str
    rates: Mapping[str, float]
    bandwidth: float
    memory: float | None = None
    efficiency: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    sources: Mapping[str, str] = field(default_factory=dict)
    packed_attention: float | None = None

    def running_packed(self) -> Hardware:
        """The machine as packed models find it."""
        if self.packed_attention is None:
            return self
        return replace(self, efficiency={**self.efficiency, "attention": self.packed_attention})

    def rate(self, format: str) -> float:
        """Peak FLOP/s of a format. Raises AttarError where none is known."""
        if format not in self.rates:
            raise AttarError(
                f"no rate for {format} is known", where=self.name, fix=f"Give one: --peak {format}=TFLOPS"
            )
        return self.rates[format]

    def ideal(self) -> Hardware:
        """The same machine with perfect kernels."""
        return replace(self, efficiency=dict.fromkeys(KINDS, 1.0), packed_attention=None)


def gpu_names() -> list[str]:
    """Names of the accelerators in the table."""
    return [name for name in _table() if not name.startswith(".")]


def find_hardware(name: str, peaks: Mapping[str, float] | None = None) -> Hardware:
    """An accelerator of the table. peaks: figures that take the place of its own, see `parse_peaks`.

    Raises AttarError for an unknown name.
    """
    peaks = peaks or {}
    found = _from_table(name)
    rates = {**found.rates, **{k: v for k, v in peaks.items() if k in RATES}}
    efficiency = dict(found.efficiency)
    if "attention" in peaks:
        efficiency["attention"] = peaks["attention"] / rates["bf16"]
    return replace(
        found, rates=rates, bandwidth=peaks.get("bandwidth", found.bandwidth), efficiency=efficiency,
        sources={**found.sources, **dict.fromkeys(peaks, "given with --peak")},
    )  # fmt: skip


def _from_table(name: str) -> Hardware:
    if name not in gpu_names():
        known = ", ".join(["cpu", *gpu_names()])
        raise AttarError(
            f"unknown hardware {name!r}",
            where="--gpu",
            fix=f"Use one of {known}; for another card the nearest, with its own rates in --peak",
        )
    entry = _table()[name]
    figures = {**entry["rates"], "bandwidth": entry["bandwidth"], "memory": entry["memory"]}
    efficiency = entry["efficiency"]
    sources = {k: v["source"] for k, v in figures.items()}
    sources |= {f"efficiency of {k}": v["source"] for k, v in efficiency.items()}
    return Hardware(
        name=name,
        title=entry["title"],
        rates={k: v["value"] * 1e12 for k, v in entry["rates"].items()},
        bandwidth=entry["bandwidth"]["value"] * 1e12,
        memory=entry["memory"]["value"] * 1e9,
        efficiency={k: v["value"] for k, v in efficiency.items()},
        sources=sources,
    )


def parse_peaks(pairs: list[str]) -> dict[str, float]:
    """{"bf16": FLOP/s, "bandwidth": bytes/s} from "bf16=0.14", in TFLOP/s, and "bandwidth=0.02", in TB/s.

    Raises AttarError for unknown names and values that are no positive numbers.
    """
    peaks = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        known = (*RATES, "attention", "bandwidth")
        if not sign or key not in known:
            fix = f"Write NAME=VALUE with a name of {', '.join(known)}"
            raise AttarError(f"{pair!r} is no peak rate", where="--peak", fix=fix)
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < 1e6:
            fix = "Give TFLOP/s, or TB/s for bandwidth"
            raise AttarError(f"{key} cannot be {text!r}", where="--peak", fix=fix)
        peaks[key] = value * 1e12
    return peaks


@cache
def _table() -> dict[str, Any]:
    text = (resources.files("attar.forecast") / "hardware.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
