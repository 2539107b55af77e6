"""Puts tests/ on the path, so that every test can say `from support import tiny`; the same numbers for every order."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from support.emulated import emulate
from support.fixtures import cli, commands, small_limit, wan_folder  # noqa: F401 - shared fixtures
from support.slow import pytest_pycollect_makeitem  # noqa: F401 - a hook

if os.environ.get("ATTAR_TEST_EMULATED"):  # kernels that this processor lacks, see make emulated
    emulate(pytest.MonkeyPatch())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What a test draws does not depend on those before it; before fixtures, also those that many tests share."""
    torch.manual_seed(0)
