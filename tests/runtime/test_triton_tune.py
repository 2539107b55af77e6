"""What is measured once is kept, and what cannot be trusted is measured again."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import astuple

import pytest

from attar.errors import AttarError

if sys.platform != "linux":
    pytest.skip("Triton is made for Linux", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from attar.runtime.triton import tune
from attar.runtime.triton.tune import Config, Problem, Tuner

CANDIDATES = (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 3), Config(16, 64, 64, 4, 3))
PROBLEM = Problem("integer_matmul", "torch.int8", 4, 4096, 1536, 1536, 1)


class Clock:
    """Says how long a configuration takes, and counts how often it was asked."""

    def __init__(self, seconds=(2.0, 1.0, 3.0), too_large=()):
        self.seconds, self.too_large, self.asked = dict(zip(CANDIDATES, seconds, strict=True)), too_large, []

    def __call__(self, run, config):
        run(config)
        if config in self.too_large:
            raise OutOfResources(200_000, 100_000, "shared memory")
        self.asked.append(config)
        return self.seconds[config]


def choose(tuner, clock, problem=PROBLEM, candidates=CANDIDATES):
    return tuner.choose(problem, candidates, lambda config: None, clock)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.delenv("ATTAR_TRITON_TUNING", raising=False)
    return tmp_path / "cache" / "triton.json"


def test_a_choice_is_measured_once_and_kept(path):
    clock = Clock()
    tuner = Tuner("GPU 1", path)
    assert choose(tuner, clock) == choose(tuner, clock) == CANDIDATES[1]
    assert clock.asked == list(CANDIDATES)
    later = Clock((1.0, 2.0, 3.0))
    assert choose(Tuner("GPU 1", path), later) == CANDIDATES[1] and later.asked == []
    other = Problem("integer_matmul", "torch.int8", 8, 4096, 1536, 1536, 1)
    assert choose(Tuner("GPU 1", path), later, other) == CANDIDATES[0]
    content = json.loads(path.read_text())
    assert content["device"] == "GPU 1" and content["choices"][str(PROBLEM)] == list(astuple(CANDIDATES[1]))
    assert len(content["choices"]) == 2 and [p.name for p in path.parent.iterdir()] == ["triton.json"]


def change(key, value):
    return lambda text: json.dumps({**json.loads(text), key: value})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        change("device", "GPU 2"),
        change("kernels", "others"),
        change("format", 0),
        change("extra", 1),
        change("choices", {str(PROBLEM): [1, 2]}),
        change("choices", {str(PROBLEM): [7, 7, 7, 7, 7]}),
        change("choices", {str(PROBLEM): "fast"}),
        change("choices", [[1, 2, 3, 4, 5]]),
    ],
)
def test_a_file_that_cannot_be_trusted_is_measured_again(path, spoil):
    choose(Tuner("GPU 1", path), Clock())
    path.write_text(spoil(path.read_text()))
    clock = Clock((1.0, 2.0, 3.0))
    assert choose(Tuner("GPU 1", path), clock) == CANDIDATES[0] and len(clock.asked) == 3
    assert choose(Tuner("GPU 1", path), Clock()) == CANDIDATES[0]


def test_two_processes_keep_what_both_measured(path):
    one, two = Tuner("GPU 1", path), Tuner("GPU 1", path)
    other = Problem("integer_matmul", "torch.int8", 4, 64, 1536, 1536, 1)
    one._choices, two._choices = one._read(), two._read()
    choose(one, Clock())
    choose(two, Clock(), other)
    assert set(json.loads(path.read_text())["choices"]) == {str(PROBLEM), str(other)}


def test_what_does_not_fit_the_device_is_passed_over(path):
    assert choose(Tuner("GPU 1", path), Clock(too_large=CANDIDATES[:2])) == CANDIDATES[2]
    with pytest.raises(AttarError, match="no configuration of the triton kernels fits"):
        choose(Tuner("GPU 2", path), Clock(too_large=CANDIDATES))


def test_a_cache_that_cannot_be_written_is_done_without(path):
    path.parent.write_text("")
    tuner, clock = Tuner("GPU 1", path), Clock()
    assert choose(tuner, clock) == choose(tuner, clock) == CANDIDATES[1] and len(clock.asked) == 3


@pytest.mark.parametrize("why", ["capture", "variable"])
def test_nothing_is_measured_in_a_capture_or_when_tuning_is_off(path, monkeypatch, why):
    if why == "capture":
        monkeypatch.setattr(tune, "_capturing", lambda: True)
    else:
        monkeypatch.setenv("ATTAR_TRITON_TUNING", "0")
    tuner, clock = Tuner("GPU 1", path), Clock()
    assert choose(tuner, clock) == CANDIDATES[0] and clock.asked == [] and not path.exists()
    monkeypatch.undo()
    assert choose(tuner, clock) == CANDIDATES[1]  # the default was for that call only


def test_rows_are_counted_in_powers_of_two():
    assert [tune.bucket(rows) for rows in (1, 16, 17, 4096, 4097)] == [16, 16, 32, 4096, 8192]


def test_candidates_are_compiled_side_by_side_and_measured_in_turns(path):
    """What fails while compiling fails again where it is measured, and is said there."""
    together, alone = threading.Barrier(len(CANDIDATES)), []

    def run(config):
        if threading.current_thread() is threading.main_thread():
            alone.append(config)
        else:
            together.wait(timeout=60)
        if config is CANDIDATES[2]:
            raise ValueError("no kernel")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: len(CANDIDATES))
        tuner = Tuner("GPU 1", path)
        with pytest.raises(ValueError, match="no kernel"):
            tuner.choose(PROBLEM, CANDIDATES, run, Clock())
        assert alone == list(CANDIDATES)
        assert tuner.choose(PROBLEM, CANDIDATES[:1], lambda config: None, Clock()) == CANDIDATES[0]
