"""Compiles the kernels once for a machine, into a cache folder.

The file is named after all that it depends on: the sources, the flags, the compiler and the architecture. Which
instruction set runs is decided when it is loaded, so a home folder may be shared by unequal machines.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from attar.errors import AttarError, reason
from attar.files import writing
from attar.runtime.cache import cache_folder

SOURCES = Path(__file__).parent / "src"
# No fused multiply-add, which would round once where the reference rounds twice; no other change of results.
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-psabi"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
_PORTABLE = {"attention.cpp": (), "entry.cpp": (), "learning.cpp": (), "scalar.cpp": ()}
_X86 = {
    "amx.cpp": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16"),
        *("-mamx-tile", "-mamx-int8", "-mamx-bf16", "-mbmi2", "-mprefer-vector-width=512"),
    ),
    "attention_amx.cpp": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
        *("-mamx-tile", "-mamx-bf16", "-mprefer-vector-width=512"),
    ),
    "attention_avx512.cpp": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
        "-mprefer-vector-width=512",
    ),
    "avx2.cpp": ("-mavx2", "-mfma", "-mbmi2"),
    "avxvnni.cpp": ("-mavx2", "-mfma", "-mbmi2", "-mavxvnni"),
    "avx512.cpp": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
        *("-mbmi2", "-mprefer-vector-width=512"),
    ),
}
_COMPILERS = ("c++", "g++", "clang++")


def built_library() -> Path:
    """The compiled kernels; compiles them, which takes seconds, where the cache has none.

    Safe in several processes at once: the file appears whole. Raises AttarError without a working compiler, or
    when the cache folder cannot be written.
    """
    compiler, version = _compiler()
    key = hashlib.sha256("\0".join([*compiler, version, platform.machine(), *_FLAGS]).encode())
    files = _files()
    for name, flags in files.items():
        key.update("\0".join([name, *flags]).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".h", ".cpp"):
            key.update(source.name.encode() + source.read_bytes())
    path = cache_folder() / f"cpu-{key.hexdigest()[:24]}.so"
    if not path.exists():
        with writing(path) as temporary:
            _compile(compiler, files, temporary)
    return path


def _files() -> dict[str, tuple[str, ...]]:
    """Every source with the flags of its own."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {**_PORTABLE, **_X86} if x86 else _PORTABLE


def _compiler() -> tuple[list[str], str]:
    """The command of the C++ compiler, $CXX before all others, and what it says about itself."""
    fix = "Install g++ or clang++, or name a compiler in CXX"
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in _COMPILERS]:
        found = shutil.which(command[0])
        if found is None:
            continue
        command = [found, *command[1:]]
        try:
            told = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise AttarError(
                f"the C++ compiler does not run ({reason(error)})", where=found, fix=fix
            ) from None
        return command, told.stdout
    sought = shlex.join(named) if named else ", ".join(_COMPILERS)
    raise AttarError("no C++ compiler was found", where=sought, fix=fix)


def _compile(compiler: list[str], files: dict[str, tuple[str, ...]], target: Path) -> None:
    """Compiles every file with its own flags, side by side, and links them, with OpenMP where there is one."""
    with tempfile.TemporaryDirectory(prefix="attar-build-") as folder:
        failure = ""
        for threads in (["-fopenmp"], []):
            objects, running = [], []
            for name, flags in files.items():
                objects.append(os.path.join(folder, f"{name}.o"))
                command = [*compiler, *_FLAGS, *threads, *flags, "-c", str(SOURCES / name), "-o", objects[-1]]
                running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
            failures = [process.communicate()[1].decode(errors="replace") for process in running]
            if not any(process.returncode for process in running):
                link = [*compiler, *_FLAGS, *threads, *objects, "-o", str(target)]
                linked = subprocess.run(link, capture_output=True, text=True)
                if linked.returncode == 0:
                    return
                failures = [linked.stderr]
            failure = next((text for text in failures if text.strip()), "no message")
        lines = [line for line in failure.splitlines() if "error" in line] or failure.splitlines()
        raise AttarError(
            f"the kernels do not compile ({lines[0].strip()})",
            where=shlex.join(compiler),
            fix="Name a newer g++ or clang++ in CXX",
        )
