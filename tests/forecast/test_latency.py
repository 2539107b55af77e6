"""Seconds from counts, bounds, and the hardware they are for."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.shapes import architecture, counted

from attar.errors import AttarError
from attar.forecast.counts import Counts, Operation
from attar.forecast.hardware import KINDS, RATES, Hardware, find_hardware, gpu_names, parse_peaks
from attar.forecast.latency import (
    amdahl,
    arithmetic_bound,
    execution_format,
    predict_latency,
    quantized_counts,
)
from attar.planning import plan_component
from attar.quantize.plan import LayerPlan
from attar.recipe import load_recipe
from attar.settings import transform_settings

MACHINE = Hardware("x", "x", {"bf16": 100.0, "int8": 200.0}, bandwidth=10.0)
operations = st.builds(
    Operation, part=st.sampled_from(["linear", "attention", "rest"]), name=st.just(""), role=st.just(""),
    block=st.none(), format=st.sampled_from(["bf16", "int8"]), flops=st.floats(0, 1e6), read=st.floats(0, 1e6),
    written=st.floats(0, 1e6),
)  # fmt: skip


@given(st.lists(operations, max_size=8))
def test_roofline(found):
    counts = Counts(tuple(found))
    seconds = predict_latency(counts, MACHINE)
    assert seconds["total"] == pytest.approx(sum(v for k, v in seconds.items() if k != "total"))
    arithmetic = sum(o.flops / MACHINE.rates[o.format] for o in found)
    moving = counts.bytes() / MACHINE.bandwidth
    assert max(arithmetic, moving) <= seconds["total"] * (1 + 1e-9) + 1e-9
    assert seconds["total"] <= arithmetic + moving + 1e-9
    slow = predict_latency(counts, replace(MACHINE, efficiency=dict.fromkeys(KINDS, 0.5)))
    assert slow["total"] == pytest.approx(2 * seconds["total"])
    assert predict_latency(counts.times(3), MACHINE)["total"] == pytest.approx(3 * seconds["total"])


def test_amdahl_by_hand():
    parts = [
        Operation(part, part, part, None, "bf16", flops, 0, 0)
        for part, flops in (("linear", 30), ("attention", 60), ("rest", 10))
    ]
    counts = Counts(tuple(parts))
    assert amdahl(counts, {}) == 1
    assert amdahl(counts, {"linear": math.inf}) == pytest.approx(100 / 70)
    assert amdahl(counts, {"linear": 2, "attention": 2}) == pytest.approx(100 / 55)
    assert amdahl(counts, {"linear": 2}, only=[]) == 1


# model and size: linears twice as fast, four times, free; attention twice as fast, free
BOUNDS = {
    ("wan-1.3b", "832x480", 81): (1.17, 1.28, 1.41, 1.54, 3.4),
    ("wan-14b", "832x480", 81): (1.31, 1.54, 1.89, 1.35, 2.1),
    ("wan-14b", "1280x720", 81): (1.16, 1.26, 1.39, 1.56, 3.6),
    ("hunyuan", "1280x720", 129): (1.07, 1.11, 1.15, 1.76, 7.6),
    ("cogvideox-5b", "720x480", 49): (1.34, 1.62, 2.04, 1.33, 2.0),
    ("ltx-2b", "704x480", 161): (1.50, 2.01, 3.03, 1.19, 1.5),
    ("flux", "1024x1024", 1): (1.67, 2.50, 5.00, 1.11, 1.25),
}


@pytest.mark.parametrize("case", BOUNDS, ids=lambda c: f"{c[0]}-{c[1]}x{c[2]}")
def test_bounds_of_real_models(case):
    counts = counted(*case)
    found = [
        amdahl(counts, faster)
        for faster in (
            {"linear": 2}, {"linear": 4}, {"linear": math.inf}, {"attention": 2}, {"attention": math.inf},
        )
    ]  # fmt: skip
    assert found == pytest.approx(list(BOUNDS[case]), rel=0.03)


def quantized(name, recipe, gpu, **overrides):
    counts, hardware = counted(name), find_hardware(gpu)
    chosen = load_recipe(recipe, overrides)
    plans = plan_component(architecture(name).transformers["transformer"], chosen)
    return counts, quantized_counts(counts, plans, transform_settings(chosen), hardware), hardware


def test_a_recipe_changes_linears_alone():
    before, after, hardware = quantized("ltx-2b", "attar-ptq", "h200")
    for part in ("attention", "rest"):
        assert (before.flops(part), before.bytes(part)) == (after.flops(part), after.bytes(part))
    assert before.flops("linear") == after.flops("linear") and after.bytes("linear") < before.bytes("linear")
    inside = [o for o in after.operations if o.part == "linear" and o.block]
    assert {o.format for o in inside if o.role != "modulation"} == {"int8"}
    assert sum(o.weights for o in inside) < 0.27 * sum(
        o.weights for o in before.operations if o.part == "linear" and o.block
    )
    assert after.flops("transform") > 0
    bound = amdahl(
        before, {"linear": hardware.rate("int8") / hardware.rate("bf16")}, {o.name for o in inside}
    )
    assert arithmetic_bound(before, after, hardware) == pytest.approx(bound)


def test_weights_alone_save_no_arithmetic():
    before, after, hardware = quantized("wan-1.3b", "rtn", "h200", **{"quantize.acts": 16})
    assert arithmetic_bound(before, after, hardware) == 1 and not after.flops("transform")
    times = [predict_latency(counts, hardware)["total"] for counts in (before, after)]
    assert times[1] <= times[0] < 1.01 * times[1]


@pytest.mark.parametrize(
    ("weights", "acts", "gpu", "format"),
    [
        (4, 4, "a100", "int8"), (4, 4, "h200", "int8"), (4, 4, "b200", "int8"), (4, 6, "4090", "int8"),
        (8, 8, "a100", "int8"), (4, None, "4090", "bf16"), (None, None, "h100", "bf16"),
    ],
)  # fmt: skip
def test_the_container_that_holds_both_factors(weights, acts, gpu, format):
    plan = LayerPlan("x", "ffn.up", weights, acts, None, 8, 8, True)
    assert execution_format(plan, find_hardware(gpu), "bf16") == format


@pytest.mark.parametrize(
    ("weights", "acts", "format"),
    [(4, 8, "int8-few"), (5, 8, "int8-few"), (6, 8, "int8"), (8, 5, "int8-few")],
)
def test_few_bits_run_at_a_rate_of_their_own_where_there_is_one(weights, acts, format):
    machine = Hardware(
        "x", "x", {"fp32": 50.0, "bf16": 100.0, "int8": 200.0, "int8-few": 400.0}, bandwidth=10.0
    )
    plan = LayerPlan("x", "ffn.up", weights, acts, None, 8, 8, True)
    assert execution_format(plan, machine, "bf16") == format


def test_rotations_take_float32_where_it_is_faster():
    rotation = Operation("transform", "", "", None, "bf16", 1000.0, 0.0, 0.0)
    slow = Hardware("x", "x", {"fp32": 100.0, "bf16": 10.0}, bandwidth=10.0)
    seconds = [
        predict_latency(Counts((o,)), slow)["total"] for o in (rotation, replace(rotation, part="linear"))
    ]
    assert seconds == [10.0, 100.0]


def test_published_times():
    """HunyuanVideo 720p x 129 frames, 50 steps with FlashAttention-3 on an H100: 945 s (arXiv 2502.04507); Wan 14B
    720p on an A800: 3,300 s (TeaCache) and 4,031 s (QuantSparse), eager attention kernels of 2025."""
    for name, gpu, forwards, low, high in (
        ("hunyuan", "h100", 50, 945, 945),
        ("wan-14b", "a100", 100, 3300, 4031),
    ):
        seconds = forwards * predict_latency(counted(name), find_hardware(gpu))["total"]
        assert 0.8 * low < seconds < 1.2 * high


def test_the_table_names_a_source_for_every_figure():
    assert gpu_names() == ["a100", "h100", "h200", "4090", "5090", "b200"]
    for name in gpu_names():
        hardware = find_hardware(name)
        assert set(KINDS) <= set(hardware.efficiency) <= {*KINDS, *hardware.rates, "rotation"}
        figures = {
            *hardware.rates,
            "bandwidth",
            "memory",
            *(f"efficiency of {k}" for k in hardware.efficiency),
        }
        assert figures == set(hardware.sources) and all(hardware.sources.values())
        assert set(hardware.rates) <= set(RATES) and all(0 < v <= 1 for v in hardware.efficiency.values())
        assert hardware.rates["int8"] >= 2 * hardware.rates["bf16"] * 0.99
        assert all(v == 1 for v in hardware.ideal().efficiency.values())
    assert "int4" not in find_hardware("h100").rates and "int4" not in find_hardware("b200").rates


def test_peaks():
    assert parse_peaks(["bf16=0.14", "bandwidth=0.02"]) == {"bf16": 0.14e12, "bandwidth": 0.02e12}
    hardware = find_hardware("h200", {"int8": 1e15, "bandwidth": 4e12, "attention": 494.5e12})
    assert (hardware.rate("int8"), hardware.bandwidth, hardware.rate("bf16")) == (1e15, 4e12, 989e12)
    assert hardware.efficiency["attention"] == 0.5 and hardware.sources["int8"] == "given with --peak"
    with pytest.raises(AttarError, match="no rate for int4"):
        hardware.rate("int4")
    for bad in ("bf17=3", "bf16", "bf16=fast", "bf16=-1", "bf16=0", "bf16=nan", "bf16=inf"):
        with pytest.raises(AttarError):
            parse_peaks([bad])
    with pytest.raises(AttarError, match="unknown hardware 'h300'"):
        find_hardware("h300")
