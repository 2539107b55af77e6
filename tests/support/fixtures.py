"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import pipelines
from support.commands import Cli, Commands

from attar.bench import limit

SMALL = (
    "--recipe",
    "s2q-vdit",
    "--set",
    "trace.prompts=2",
    "--set",
    "select.count=3",
    "--set",
    "reconstruct.epochs=2",
)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capsys)


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large product of `attar bench` is a small one: on some processors it takes many seconds."""
    for name, size in (("ROWS", 64), ("WIDTH", 256), ("OUT", 512)):
        monkeypatch.setattr(limit, name, size)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    server = Commands(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Wan pipeline; not to be changed."""
    return pipelines.save(tmp_path_factory.mktemp("models") / "wan")
