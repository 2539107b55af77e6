"""Kernels of instruction sets that this processor may lack, on instructions written in C++: the same tests as its own.

`make emulated` runs all of them; here, in the slow tests, are those of integers, rotations and branches, and a few of
attention."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attar.errors import AttarError
from attar.runtime.cpu.library import library

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FILES = ("runtime/test_cpu_kernels.py", "runtime/test_branch.py")
ELSEWHERE = "[scalar", "[avx2", "blocks_of_rows", "compiles", "operator"  # they run here anyway, or take long
ATTENTION = (
    "long_sequence or one_key_is_copied or huge_logits or correct_what_was_summed or views or nan_stays"
)

try:
    if "avx2" not in library().levels:
        pytest.skip("the emulation needs AVX2", allow_module_level=True)
except AttarError as error:
    pytest.skip(f"no kernels: {error.what}", allow_module_level=True)


def passed(*arguments: str) -> int:
    """How many tests do, all of them, with all instruction sets emulated."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"ATTAR_TEST_EMULATED": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found and "failed" not in done.stdout
    return int(found[1])


def test_integers_rotations_and_branches():
    but_these = " and ".join(f"not {words}" for words in ELSEWHERE)
    assert passed(*(f"tests/{name}" for name in FILES), "-k", but_these) > 400


def test_attention():
    assert passed("tests/runtime/test_attention.py", "-k", ATTENTION) >= 12
