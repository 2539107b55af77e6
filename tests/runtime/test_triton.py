"""The Triton kernels: checked in the interpreter, compiled for real GPUs, and run on one where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("triton_checks.py")
# half of the interpreter's time, so that two processes share it
SLOW_THERE = "rotation or every_tile or compiles"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is made for Linux")


def run_checks(*options, **variables):
    """The checks in a process of their own, in which no other test has imported Triton."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "ATTAR_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, str(CHECKS)]
    done = subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("which", [SLOW_THERE, f"not ({SLOW_THERE})"], ids=["large", "small"])
def test_in_the_interpreter(which):
    run_checks("-k", which, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_larger_tiles_in_the_interpreter():
    run_checks("-m", "slow", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    run_checks("-m", "slow or not slow", ATTAR_CACHE=str(tmp_path))


SHARED = 99 * 1024  # bytes that a program may have on the GPUs that have least (8.6, 8.9, 12.0)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """The kernels compiled for any GPU, with nothing left over from earlier runs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from support import triton_compile

    return triton_compile


@pytest.mark.slow(but=["90-wgmma"])
@pytest.mark.parametrize("capability, instruction", [(80, "mma.sync"), (90, "wgmma"), (120, "mma.sync")])
def test_products_run_on_the_tensor_cores_of_real_gpus(compiler, capability, instruction):
    from attar.runtime.triton.products import FLOATING, INTEGER

    for bits in (4, 8) if capability == 90 else (4,):
        code = compiler.compiled_product(capability, INTEGER[0], bits).asm["ptx"]
        assert re.search(rf"{instruction}\S*\.s32\.s8\.s8", code)
        # Nothing that would round otherwise than the reference, and full 16 bytes at a time from memory.
        assert "fma.rn.f32" not in code and "cp.async.cg" in code and "st.global.v4" in code
    code = compiler.compiled_product(capability, FLOATING[0], 4, weight_only=True).asm["ptx"]
    assert re.search(rf"{instruction}\S*\.f32\.bf16\.bf16", code)


@pytest.mark.slow(but=["90-wgmma"])
@pytest.mark.parametrize("capability, instruction", [(89, "mma.sync"), (90, "wgmma"), (120, "mma.sync")])
def test_float8_runs_on_the_tensor_cores_of_real_gpus(compiler, capability, instruction):
    from attar.runtime.triton.products import FLOATING, INTEGER

    code = compiler.compiled_product(capability, INTEGER[0], 8, float8=True).asm["ptx"]
    assert re.search(rf"{instruction}\S*\.f32\.e4m3\.e4m3", code) and "fma.rn.f32" not in code
    code = compiler.compiled_product(capability, FLOATING[0], 8, weight_only=True, float8=True).asm["ptx"]
    assert re.search(rf"{instruction}\S*\.f32\.bf16\.bf16", code)
    code = compiler.compiled_quantize(capability, 8, FP8=True, MOST=448.0).asm["ptx"]
    assert re.search(r"cvt\.rn\.satfinite\.e4m3x2", code) and "div.rn.f32" in code
    compiler.compiled_rotation(capability, 24, 64, 12, FP8=True, MOST=448.0)


def test_rows_are_quantized_with_the_rounding_of_the_reference(compiler):
    """Divisions of the row alone; those of its numbers are a product and two fused multiply-adds."""
    code = compiler.compiled_quantize(90, 8, channel_ptr=None).asm["ptx"]
    assert len(re.findall(r"div\.rn\.f32", code)) <= 4 and not re.search(r"div\.(full|approx)", code)
    numbers = len(re.findall(r"fma\.rn\.f32", code))
    assert numbers == 2 * 1536 // 128 and "ld.global.v4" in code  # 128 threads


@pytest.mark.slow(but=["bf16"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_many_rows_run_on_the_tensor_cores_of_hopper(compiler, dtype):
    from attar.runtime.triton.available import _TILES
    from attar.runtime.triton.products import DENSE

    made = compiler.compiled_dense(90, DENSE[0], dtype)  # the one that runs unmeasured
    code = made.asm["ptx"]
    assert re.search(r"wgmma\S*\.s32\.s8\.s8", code) and "cp.async.bulk.tensor" in code
    assert "fma.rn.f32" not in code and made.metadata.shared <= _TILES
    for bits in (3, 4, 8):
        compiler.compiled_unpack(90, bits)
    compiler.compiled_unpack(80, 4, "bf16", scale_ptr=None)


@pytest.mark.slow
def test_ones_and_nones_are_constants(compiler):
    """A single row, a single output, one group, no bias: Triton compiles kernels of their own for these."""
    from attar.runtime.triton.products import DENSE, FLOATING, INTEGER

    compiler.compiled_product(90, INTEGER[-1], 4, m=1, bias_ptr=None)
    compiler.compiled_product(90, INTEGER[-1], 4, n=1, m=1)
    compiler.compiled_product(90, FLOATING[-1], 4, weight_only=True, m=1, groups=1, bias_ptr=None)
    compiler.compiled_product(90, FLOATING[-1], 8, weight_only=True, n=1, groups=1)
    compiler.compiled_quantize(90, channel_ptr=None, clip_ptr=None, width=1, x_stride=1)
    compiler.compiled_rotation(90, 24, 64, 12, channel_ptr=None, clip_ptr=None)
    compiler.compiled_rotation(90, 24, 64, 12, m=1, channel_ptr=None)
    compiler.compiled_dense(90, DENSE[0], bias_ptr=None, n=1)


@pytest.mark.parametrize(
    "left, right, order",
    [
        (64, 80, 0),
        (40, 128, 20),
        *(pytest.param(*f, marks=pytest.mark.slow) for f in ((96, 128, 0), (108, 128, 108))),
    ],
)
@pytest.mark.parametrize("capability", [89, pytest.param(90, marks=pytest.mark.slow)])
def test_rotations_of_real_widths_fit_every_gpu(compiler, capability, left, right, order):
    """Every tile of the largest one, and on one GPU of all; of the others here the tile that runs unmeasured."""
    from attar.runtime.triton.activations import ROTATIONS, Factors

    for config in ROTATIONS if left == 96 or capability == 90 else ROTATIONS[:1]:
        made = compiler.compiled_rotation(capability, left, right, order, config=config)
        assert made.metadata.shared <= Factors(order, left, right).memory + 1024 <= SHARED
        assert not re.search(r"div\.(full|approx)", made.asm["ptx"])


@pytest.mark.slow
def test_rotations_of_float32_fit_every_gpu(compiler):
    made = compiler.compiled_rotation(89, 32, 48, dtype="fp32")
    assert made.metadata.shared <= SHARED


@pytest.mark.slow(but=["4"])
@pytest.mark.parametrize("bits", [3, 4])
def test_what_runs_untuned_fits_every_gpu(compiler, bits):
    """In a capture the first tile for a number of rows is taken without a trial; wider codes take less memory."""
    from attar.runtime.triton.products import FLOATING, INTEGER

    for candidates, weight_only in ((INTEGER, False), (FLOATING, True)):
        for first in {next(c for c in candidates if c.rows <= rows) for rows in (16, 128)}:
            dtype = "fp32" if weight_only else "bf16"
            made = compiler.compiled_product(89, first, bits, dtype, weight_only)
            assert made.metadata.shared <= SHARED, first
