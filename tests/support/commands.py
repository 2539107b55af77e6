"""The command line as tests use it: inside this process, or in processes that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from attar.cli import main

# importing torch and diffusers takes seconds, so one process does it and forks for every command; frozen objects stay
# in memory that the processes share
_SERVER = """
import gc, json, os, runpy, signal, sys, traceback
import torch
torch.set_num_threads(1)
import diffusers, transformers, rich.progress, rich.table
import attar.cli, attar.conductor, attar.forecast.dry_run, attar.save
from diffusers import DiffusionPipeline, HunyuanVideoPipeline, StableDiffusionPipeline, WanPipeline
from transformers import CLIPTextModel, LlamaModel, UMT5EncoderModel
gc.collect(), gc.freeze()
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
    jobs = json.loads(line)
    pids = []
    for job in jobs:
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        for descriptor, name in ((1, job["out"]), (2, job["log"])):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.environ.update(job["environment"])
        sys.argv = ["attar", *job["args"]]
        if job["writes"] is not None:
            os.replace = deadly(os.replace, job["writes"])
        code = 0
        try:
            runpy.run_path(job["args"][0]) if job["args"][0].endswith(".py") else attar.cli.main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


@dataclass
class Command:
    """A running command; `wait` gives its exit code, -9 when it was killed. out, log: files of what it prints.

    It may consist of several processes of one job: then pids, outs and logs have an entry for each.
    """

    pids: list[int]
    server: Commands
    outs: list[Path]
    logs: list[Path]
    store: TCPStore | None = None  # kept as long as the command

    @property
    def out(self) -> Path:
        return self.outs[0]

    @property
    def log(self) -> Path:
        return self.logs[0]

    def kill(self, rank: int = 0) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(self.pids[rank], signal.SIGKILL)

    def wait_all(self) -> list[int]:
        return json.loads(self.server.answer())

    def wait(self) -> int:
        (code,) = self.wait_all()
        return code


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

    def start(self, *args: object, writes: int | None = None, processes: int = 1, deadly: int = 0) -> Command:
        """writes: how many files may be put in their place before the process kills itself (SIGKILL); of several
        processes of one job the one of rank `deadly` does. A .py file as the first argument is run as it is."""
        self.count += 1
        jobs = []
        environments, store = ([{}], None) if processes == 1 else launched(processes)
        for rank, environment in enumerate(environments):
            out, log = (str(self.folder / f"{name}-{self.count}-{rank}.txt") for name in ("out", "log"))
            dies = writes if rank == deadly else None
            job = {"args": [str(a) for a in args], "out": out, "log": log, "writes": dies}
            jobs.append({**job, "environment": environment})
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        outs, logs = ([Path(job[name]) for job in jobs] for name in ("out", "log"))
        return Command(json.loads(self.answer()), self, outs, logs, store)

    def run(self, *args: object, writes: int | None = None) -> int:
        command = self.start(*args, writes=writes)
        code = command.wait()
        assert code in (0, -9), command.log.read_text()
        return code

    def run_killed(self, *args: object, out: Path, writes: Sequence[int]) -> int:
        """Runs a command until it ends by itself, and gives how often it was killed before.

        out: what it makes, which is there only at the end. writes: files that the first process, the second and so on
        put in their places before they die, over and over.
        """
        for kills in range(40):
            if self.run(*args, writes=writes[kills % len(writes)]) == 0:
                return kills
            assert not out.exists()
        raise AssertionError("it never ends")

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def launched(processes: int) -> tuple[list[dict[str, str]], TCPStore]:
    """What a launcher tells each of the processes of one job on this machine, and the store that it keeps for them."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
    }  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)], store


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
