"""This CPU: what is measured, and whether a forecast from it comes true."""

import time
from statistics import median

import pytest
import torch
from diffusers import WanTransformer3DModel

from attar.forecast.counts import count_transformer
from attar.forecast.latency import predict_latency
from attar.forecast.measure import measure_cpu

PEAKS = {"fp32": 5e10, "bf16": 1e11, "int8": 2e11, "attention": 2e10, "bandwidth": 1e10}


def test_given_peaks_are_not_measured():
    started = time.process_time()  # of this process alone, whatever else the machine does
    hardware = measure_cpu(PEAKS, rounds=1000)
    assert time.process_time() - started < 5
    assert hardware.rates == {"fp32": 5e10, "bf16": 1e11, "int8": 2e11} and hardware.bandwidth == 1e10
    assert hardware.efficiency == {"gemm": 1.0, "attention": 0.2, "bandwidth": 1.0}
    assert set(hardware.sources.values()) == {"given with --peak"} and hardware.memory is None


def test_what_is_missing_is_measured():
    hardware = measure_cpu({k: v for k, v in PEAKS.items() if k != "bandwidth"}, rounds=2)
    assert hardware.sources["bandwidth"] == "measured here and now" and 1e8 < hardware.bandwidth < 1e12


def test_packed_models_have_rates_of_their_own():
    hardware = measure_cpu({"fp32": 5e10, "bf16": 1e11, "bandwidth": 1e10}, rounds=2)
    assert all(1e8 < hardware.rates[name] < 1e14 for name in ("int8", "int8-few"))
    packed = hardware.running_packed()
    assert packed.efficiency["attention"] == hardware.packed_attention > 0
    assert packed.rates == hardware.rates and packed.running_packed() == packed
    assert hardware.ideal().running_packed().efficiency["attention"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_a_block_takes_as_long_as_forecast(format):
    """One block of Wan 1.3B at 512 tokens, and the rates measured in turns with it: the median of the ratios."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[format]
    config = dict(num_attention_heads=12, num_layers=1, ffn_dim=8960)
    model = WanTransformer3DModel(**config).to(dtype).eval()
    call = dict(
        hidden_states=torch.randn(1, 16, 2, 32, 32, dtype=dtype),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 128, 4096, dtype=dtype),
    )
    with torch.device("meta"):
        same = WanTransformer3DModel(**config).to(dtype)
    counts = count_transformer(same, {k: v.to("meta") for k, v in call.items()})
    ratios = []
    with torch.no_grad():
        model(**call)
        for _ in range(9):
            forecast = predict_latency(counts, measure_cpu(format=format, rounds=2))["total"]
            started = time.perf_counter()
            model(**call)
            ratios.append(forecast / (time.perf_counter() - started))
    assert median(ratios) == pytest.approx(1, rel=0.25), sorted(ratios)
