"""The CPU kernels of instruction sets that this processor lacks, on instructions written in C++ (emulated_x86.h)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from attar.runtime.cpu import build, library

_HEADER = Path(__file__).with_name("emulated_x86.h")
_WIDER = ("amx.cpp", "attention_amx.cpp", "attention_avx512.cpp", "avx512.cpp", "avxvnni.cpp")
_ASKING = ("attention.cpp", "entry.cpp")  # which instruction sets there are


def emulate(patch: pytest.MonkeyPatch) -> None:
    """Every instruction set runs, whatever the processor has beyond AVX2; AMX is the one that is chosen."""
    sources = build._files()
    digest = hashlib.sha256(
        _HEADER.read_bytes()
    ).hexdigest()  # among the flags, after which the library is named
    here = ("-O1", "-include", str(_HEADER), f"-DEMULATED_BY={digest}")
    own = {name: (*sources["avx2.cpp"], *here) for name in _WIDER} | {name: here for name in _ASKING}
    patch.setattr(build, "_files", lambda: sources | own)
    patch.setattr(library, "_found", None)
