"""The Triton kernels: checked in the interpreter, compiled for real GPUs, and run on one where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("triton_checks.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is made for Linux")


def run_checks(**variables):
    """The checks in a process of their own, in which no other test has imported Triton."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "ATTAR_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_in_the_interpreter():
    run_checks(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    run_checks(ATTAR_CACHE=str(tmp_path))
