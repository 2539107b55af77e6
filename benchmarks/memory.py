"""What block reconstruction learned, kept on disk, so that methods that differ only in rounding learn once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from attar.files import writing
from attar.quantize import block
from attar.quantize.reconstruct import ReconstructionResult, reconstruct_block


@dataclass
class Memory:
    """Whether anything was remembered instead of learned."""

    used: bool = False


@contextlib.contextmanager
def remembering(folder: Path) -> Iterator[Memory]:
    """Inside, the blocks of one compression take their learned parameters from `folder`, or leave them there.

    Blocks are told apart by their order. What is learned must not depend on how earlier blocks were rounded, so
    the folder belongs to one recipe without its rounding, on full-precision inputs, and one seed.
    """
    memory, count = Memory(), 0

    def remembered(run: Any, calls: Any, targets: Any, groups: Any, *rest: Any, **more: Any) -> Any:
        nonlocal count
        if "codes" in groups:  # a part of the rounding
            return reconstruct_block(run, calls, targets, groups, *rest, **more)
        path = folder / f"block-{count:03d}.safetensors"
        count += 1
        named = {f"{group}.{i}": p for group, ps in groups.items() for i, p in enumerate(ps)}
        if path.is_file():
            with safe_open(path, framework="pt") as file, torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(file.get_tensor(name))
                known = json.loads(file.metadata()["learning"])
            memory.used = True
            return ReconstructionResult(**known)
        result = reconstruct_block(run, calls, targets, groups, *rest, **more)
        with writing(path) as temporary:
            tensors = {name: p.detach().contiguous() for name, p in named.items()}
            save_file(tensors, temporary, {"learning": json.dumps(asdict(result))})
        return result

    with mock.patch.object(block, "reconstruct_block", remembered):
        yield memory
