"""Puts tests/ on the path, so that every test can say `from support import tiny`; the same numbers for every order."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from support.emulated import emulate
from support.fixtures import cli, commands, small_limit, wan_folder  # noqa: F401 - shared fixtures

if os.environ.get("ATTAR_TEST_EMULATED"):  # kernels that this processor lacks, see make emulated
    emulate(pytest.MonkeyPatch())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A test marked `slow(but=[...])` is slow but with these parameters, named by their ids."""
    known, kept = set(), set()
    for item in items:
        for mark in [mark for mark in item.own_markers if mark.name == "slow" and mark.kwargs]:
            places = {(item.originalname, identity) for identity in mark.kwargs["but"]}
            known |= places
            if (item.originalname, item.callspec.id) in places:
                kept.add((item.originalname, item.callspec.id))
                item.own_markers.remove(mark)
    missing = sorted(known - kept)
    if missing and not any(
        "[" in argument for argument in sys.argv
    ):  # a test asked for by its id comes alone
        raise pytest.UsageError(f"slow(but=...) names parameters that are not there: {missing}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What a test draws does not depend on those before it; before fixtures, also those that many tests share."""
    torch.manual_seed(0)
