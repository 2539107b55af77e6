"""Killed compressions go on, and end with the bytes of an uninterrupted run."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import pipelines
from support.commands import contents

SMALL = ("--set", "trace.prompts=2", "--set", "select.count=3", "--set", "reconstruct.epochs=2")
RUNS = {
    "learned": ("wan", ["--recipe", "s2q-vdit", *SMALL]),
    "quantized inputs, two experts": (
        "wan22",
        ["--recipe", "s2q-vdit", *SMALL, "--set", "reconstruct.propagate=quant"],
    ),
    "no data": ("wan", ["--recipe", "hadamard"]),
    "polished": (
        "wan",
        ["--recipe", "attar-ptq", *SMALL, "--set", "finetune={steps: 4, batch_size: 2, scale_lr: 1e-3}"],
    ),
    "trained whole": (
        "wan22",
        [
            "--recipe",
            "efficientdm",
            *SMALL[:2],
            "--set",
            "finetune.steps=4",
            "--set",
            "finetune.adapter_rank=2",
        ],
    ),
    "two segments": (
        "hunyuan",
        ["--recipe", "s2q-vdit", *SMALL, "--set", "trace.steps=3", "--set", "reconstruct.propagate=quant"],
    ),
}


LONG = ("quantized inputs, two experts", "polished", "trained whole")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: pipelines.save(root / name, name, steps=pipelines.CASES[name].steps)
        for name in ("wan", "wan22", "hunyuan")
    }


@pytest.fixture(scope="module")
def whole(commands, models, tmp_path_factory):
    """The checkpoint of an uninterrupted run, made once for each kind of run."""
    made: dict[str, dict[str, bytes]] = {}

    def of(kind: str) -> dict[str, bytes]:
        if kind not in made:
            model, options = RUNS[kind]
            out = tmp_path_factory.mktemp("whole") / "small"
            assert commands.run("compress", models[model], "-o", out, *options) == 0
            made[kind] = contents(out)
        return made[kind]

    return of


@pytest.mark.parametrize(
    ("kind", "writes"),
    [
        pytest.param("learned", (1, 2), marks=pytest.mark.slow),
        ("no data", (1, 2)),
        *(pytest.param(kind, (3, 2, 4), marks=pytest.mark.slow) for kind in LONG),
        *(pytest.param(kind, (1, 2), marks=pytest.mark.slow) for kind in LONG),
    ],
)
def test_killed_before_every_file(kind, writes, commands, models, whole, tmp_path):
    """Each process puts one or two files in their places, and dies when the next one is written but not there yet.

    Two, since a block is on disk with the inputs of the next one. The long runs are slow tests, of two to four as well.
    """
    model, options = RUNS[kind]
    out = tmp_path / "small"
    assert commands.run_killed("compress", models[model], "-o", out, *options, out=out, writes=writes) >= 3
    assert contents(out) == whole(kind)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "small.work"]
    left = contents(tmp_path / "small.work")
    assert not [name for name in left if name.endswith(".tmp") or "boundary" in name]


def test_killed_at_states_of_the_workspace(commands, models, whole, tmp_path):
    model, options = RUNS["learned"]
    out, work = tmp_path / "small", tmp_path / "small.work"
    waits = ["job.json", "trace/prompt-0000.safetensors", "transformer/boundary-001.safetensors",
             "transformer/block-001.safetensors"]  # fmt: skip
    for name in waits:
        command = commands.start("compress", models[model], "-o", out, *options)
        deadline = time.monotonic() + 60
        while not (work / name).is_file() and time.monotonic() < deadline:
            time.sleep(0.001)
        command.kill()
        assert command.wait() == -9, command.log.read_text()
    assert commands.run("compress", models[model], "-o", out, *options) == 0
    assert contents(out) == whole("learned")


def test_killed_at_random_moments(commands, models, whole, tmp_path):
    model, options = RUNS["two segments"]
    out, moments = tmp_path / "small", random.Random(0)
    for _ in range(6):
        command = commands.start("compress", models[model], "-o", out, *options)
        time.sleep(moments.uniform(0.05, 0.9))
        command.kill()
        if command.wait() == 0:
            break
    if not out.exists():
        assert commands.run("compress", models[model], "-o", out, *options) == 0
    assert contents(out) == whole("two segments")


@pytest.mark.slow
def test_the_real_command_killed_and_resumed(models, whole, tmp_path):
    model, options = RUNS["learned"]
    out = tmp_path / "small"
    command = [sys.executable, "-m", "attar", "compress", str(models[model]), "-o", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while (
        not (tmp_path / "small.work" / "transformer" / "block-000.safetensors").is_file()
        and first.poll() is None
    ):
        time.sleep(0.002)
    first.kill()
    assert first.wait() == -9
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(out) == whole("learned")


def test_removed_files_are_made_again(commands, models, whole, tmp_path):
    model, options = RUNS["learned"]
    out, work = tmp_path / "small", tmp_path / "small.work"
    arguments = ("compress", models[model], "-o", out, *options)
    assert commands.run(*arguments) == 0
    for name in ("transformer/block-001.safetensors", "trace/prompt-0001.safetensors"):
        (work / name).unlink()
    assert commands.run(*arguments, "--overwrite") == 0
    assert contents(out) == whole("learned")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "small.work"]


def test_a_damaged_file_says_what_to_do(commands, models, whole, tmp_path):
    model, options = RUNS["learned"]
    out, work = tmp_path / "small", tmp_path / "small.work"
    arguments = ("compress", models[model], "-o", out, *options)
    assert commands.run(*arguments, writes=6) == -9
    damaged = work / "transformer" / "block-000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    command = commands.start(*arguments)
    assert command.wait() == 1
    last = command.log.read_text().splitlines()[-1]
    assert (
        "the file is damaged (checksum mismatch)" in last
        and "block-000" in last
        and "Delete it and run again" in last
    )
    damaged.unlink()
    assert commands.run(*arguments) == 0
    assert contents(out) == whole("learned")


def test_two_processes_in_one_workspace(commands, models, tmp_path):
    import fcntl

    model, options = RUNS["no data"]
    work = tmp_path / "small.work"
    work.mkdir()
    with open(work / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = commands.start("compress", models[model], "-o", tmp_path / "small", *options)
        assert command.wait() == 1
        assert "another process works in the workspace" in command.log.read_text()
    assert commands.run("compress", models[model], "-o", tmp_path / "small", *options) == 0


def test_equal_runs_on_other_names_of_the_same_model_are_equal(models, commands, whole, tmp_path):
    """Nothing of the machine or the moment is in the checkpoint: neither paths nor times."""
    model, options = RUNS["learned"]
    moved = tmp_path / "elsewhere" / models[model].name
    moved.parent.mkdir()
    moved.symlink_to(models[model])
    out = tmp_path / "small"
    assert commands.run("compress", moved, "-o", out, *options, "--workspace", tmp_path / "other") == 0
    found = contents(out)
    assert found == whole("learned")
    for name, content in found.items():
        assert str(tmp_path).encode() not in content and str(models[model].parent).encode() not in content, (
            name
        )
