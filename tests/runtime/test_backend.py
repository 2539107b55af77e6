"""Which backend runs: chosen, forced, or explained."""

from __future__ import annotations

import multiprocessing
import sys

import pytest
import torch

from attar.errors import AttarError
from attar.runtime import PackedLinear, backend_description, backend_name, use_backend
from attar.runtime.cpu import build, library
from attar.runtime.triton import available


def layer():
    return PackedLinear.from_codes(torch.ones(4, 8, dtype=torch.int8), torch.ones(4, 1), 4, act_bits=8)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache."""
    monkeypatch.setattr(library, "_found", None)
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def test_without_a_compiler_the_reference_runs_and_says_why(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    assert backend_name() == "reference"
    assert "not fast" in backend_description() and "no C++ compiler was found" in backend_description()
    assert torch.equal(layer()(torch.ones(2, 8)), torch.full((2, 4), 8.0))
    with pytest.raises(AttarError, match="'cpu' does not work here: no C\\+\\+ compiler") as caught:
        use_backend("cpu").__enter__()
    assert "g++" in caught.value.fix
    monkeypatch.setenv("ATTAR_BACKEND", "cpu")
    with pytest.raises(AttarError, match="does not work here"):
        layer()(torch.ones(2, 8))


@pytest.mark.parametrize(
    "script, message",
    [
        ("exit 1", "does not run"),
        ('[ "$1" = --version ] || { echo "x.cpp: error: bad day" >&2; exit 1; }', "bad day"),
        ("exit 0", "cannot be written"),
    ],
)
def test_a_broken_compiler(fresh, monkeypatch, script, message):
    compiler = fresh / "cxx"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert backend_name() == "reference" and message in backend_description()
    assert not list((fresh / "cache").glob("*"))


def test_a_cache_that_cannot_be_written(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("ATTAR_CACHE", str(fresh / "file"))
    if backend_name() == "reference":
        assert "cannot be written" in backend_description() or "no C++ compiler" in backend_description()
    else:
        pytest.fail("kernels appeared in a file")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("ATTAR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "attar"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "attar"


@pytest.mark.slow
def test_two_processes_build_at_once(monkeypatch, tmp_path):
    try:
        build.built_library()
    except AttarError as error:
        pytest.skip(error.what)
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_files", lambda: build._PORTABLE)  # the fewest files that make a library
    with multiprocessing.get_context("fork").Pool(2) as pool:
        first, second = (pool.apply_async(build.built_library) for _ in range(2))
        assert first.get(100) == second.get(100)
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def test_forcing():
    with use_backend("reference"):
        assert backend_name() == "reference" and backend_description().endswith("not fast")
        try:
            with use_backend("cpu"):
                assert backend_name() == "cpu" and backend_description().startswith("cpu: compiled kernels")
                with pytest.raises(AttarError, match="does not run on cuda"):
                    backend_name("cuda")
        except AttarError as error:
            assert "does not work here" in error.what
        assert backend_name() == "reference"
    with pytest.raises(AttarError, match="unknown backend 'fast'"), use_backend("fast"):
        pass
    assert backend_name("mps") == "reference" and "no kernels for mps yet" in backend_description("mps")


def test_forcing_by_the_environment(monkeypatch):
    monkeypatch.setenv("ATTAR_BACKEND", "reference")
    assert backend_name() == "reference"
    monkeypatch.setenv("ATTAR_BACKEND", "gpu")
    with pytest.raises(AttarError, match="unknown backend 'gpu'"):
        layer()(torch.ones(2, 8))


def test_forcing_an_instruction_set(monkeypatch):
    if backend_name() != "cpu":
        pytest.skip("no kernels")
    with library.library().use_kernels("scalar"):
        assert "(scalar" in backend_description()
    with pytest.raises(AttarError, match="no kernels 'mmx'"), library.library().use_kernels("mmx"):
        pass
    monkeypatch.setattr(library, "_found", None)
    monkeypatch.setenv("ATTAR_CPU_KERNELS", "scalar")
    assert library.library().kernels == "scalar"


@pytest.fixture
def looked():
    """The machine is looked at anew."""
    available._look.cache_clear()
    yield
    available._look.cache_clear()


def test_without_triton_the_reference_runs_on_gpus_and_says_why(looked, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    assert backend_name("cuda") == "reference" and "Triton is not installed" in backend_description("cuda")
    with pytest.raises(AttarError, match="'triton' does not work here: Triton is not installed") as caught:
        use_backend("triton").__enter__()
    assert caught.value.fix == "pip install triton"


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is made for Linux")
@pytest.mark.parametrize(
    "capabilities, message",
    [([], "there is no CUDA device"), ([(9, 0), (7, 5)], "compute capability 8.0 or higher")],
)
def test_gpus_that_cannot_run_the_kernels(looked, monkeypatch, capabilities, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert backend_name("cuda") == "reference" and message in backend_description("cuda")
    monkeypatch.setenv("ATTAR_BACKEND", "triton")
    with pytest.raises(AttarError, match=f"'triton' does not work here: .*{message}") as caught:
        layer()(torch.ones(2, 8))
    assert caught.value.where == ("GPU 1" if capabilities else "ATTAR_BACKEND")
