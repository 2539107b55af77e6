"""The command line as tests use it: inside this process, or in processes that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from attar.cli import main

# importing torch and diffusers takes seconds, so one process does it and forks for every command
_SERVER = """
import json, os, signal, sys, traceback
import torch
torch.set_num_threads(1)
import diffusers, transformers
import attar.cli, attar.conductor, attar.forecast.dry_run, attar.save
from diffusers import DiffusionPipeline, WanPipeline
print("ready", flush=True)

def deadly(replace, allowed):
    def counted(*args, **kwargs):
        nonlocal allowed
        if allowed == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        allowed -= 1
        return replace(*args, **kwargs)
    return counted

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for descriptor, name in ((1, job["out"]), (2, job["log"])):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = ["attar", *job["args"]]
        if job["writes"] is not None:
            os.replace = deadly(os.replace, job["writes"])
        code = 0
        try:
            attar.cli.main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Command:
    """A running command; `wait` gives its exit code, -9 when it was killed. out, log: files of what it prints."""

    pid: int
    server: Commands
    out: Path
    log: Path

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        return int(self.server.answer())


class Commands:
    """Starts `attar` commands in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.answer() == "ready"

    def start(self, *args: object, writes: int | None = None) -> Command:
        """writes: how many files may be put in their place before the process kills itself (SIGKILL)."""
        self.count += 1
        out, log = (self.folder / f"{name}-{self.count}.txt" for name in ("out", "log"))
        job = {"args": [str(a) for a in args], "out": str(out), "log": str(log), "writes": writes}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Command(int(self.answer()), self, out, log)

    def run(self, *args: object, writes: int | None = None) -> int:
        command = self.start(*args, writes=writes)
        code = command.wait()
        assert code in (0, -9), command.log.read_text()
        return code

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line of an error; fails where there is more, or none."""
        assert self.code != 0 and "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and self.err.rstrip().splitlines()[-1] == lines[0], self.err
        assert self.out == ""
        return lines[0]


class Cli:
    """Runs commands in this process, through the real entry point."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *args: object) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["attar", *map(str, args)])
        self.capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        shown = self.capsys.readouterr()
        return Result(code, shown.out, shown.err)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
