"""Where the time of a block goes: seconds of its parts, each without the parts inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from attar.runtime.clock import now

REST = "rest"


@contextmanager
def timing_parts(
    module: nn.Module, parts: Mapping[str, str], device: torch.device | str = "cpu"
) -> Iterator[dict[str, float]]:
    """Fills the yielded dict with seconds by part while `module` runs; the rest of its time is "rest".

    parts: dotted name of a submodule -> part; several may share one. What runs inside a part and has a part of its
    own is counted there alone. On CUDA every part waits for the device, which slows the whole down.
    """
    seconds: dict[str, float] = {}
    open_parts: list[list[float]] = []  # [start, seconds of the parts inside]

    def enter(*_: Any) -> None:
        open_parts.append([now(device), 0.0])

    def leave(part: str) -> None:
        start, inside = open_parts.pop()
        taken = now(device) - start
        seconds[part] = seconds.get(part, 0.0) + taken - inside
        if open_parts:
            open_parts[-1][1] += taken

    def closing(part: str) -> Any:
        return lambda *_: leave(part)

    hooks = []
    for name, part in {"": REST, **parts}.items():
        found = module.get_submodule(name)
        hooks.append(found.register_forward_pre_hook(enter))
        hooks.append(found.register_forward_hook(closing(part)))
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def parts_of(module: nn.Module, roles: Mapping[str, str], attentions: Mapping[str, str]) -> dict[str, str]:
    """Name of a submodule -> part: each linear's role, "self attention" and such for what is between them, "norms".

    roles: name of a linear -> role. attentions: name of an attention -> its kind.
    """
    norms = {
        name: "norms"
        for name, part in module.named_modules()
        if name and "norm" in type(part).__name__.lower() and not any(part.children())
    }
    return {**norms, **{name: f"{kind} attention" for name, kind in attentions.items()}, **roles}
