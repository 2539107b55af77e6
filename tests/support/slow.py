"""The marker `slow(but=[...])`: a test whose parameters are slow, but those that are named by their ids."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Generator[None, Any, Any]:
    """Takes the mark off those parameters. A function's are all there, whichever are asked for."""
    found = yield
    functions = (
        [item for item in found if isinstance(item, pytest.Function)] if isinstance(found, list) else []
    )
    for mark in {id(mark): mark for item in functions for mark in _marks(item)}.values():
        missing = set(mark.kwargs["but"])
        for item in functions:
            identity = item.callspec.id if hasattr(item, "callspec") else ""
            if identity in mark.kwargs["but"]:
                missing.discard(identity)
                item.own_markers.remove(mark)
        if missing:
            raise pytest.Collector.CollectError(
                f"slow(but=...) of {functions[0].originalname} names parameters that are not there: {sorted(missing)}"
            )
    return found


def _marks(item: pytest.Function) -> list[pytest.Mark]:
    return [mark for mark in item.own_markers if mark.name == "slow" and mark.kwargs]
