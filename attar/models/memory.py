"""Whether a pipeline is loaded whole or streamed, by what it needs and what there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attar.memory import free_memory
from attar.models.shards import Shards
from attar.models.source import Source, default_dtype, load_pipeline
from attar.models.streamed import not_streamable, streamed_pipeline

HEADROOM = 1.5  # what blocks, samples and activations take beside the weights, as a factor of these


@dataclass(frozen=True)
class Choice:
    """streamed: read the weights block by block. reason: one line that says why. decodes: autoencoders get their
    weights all the same."""

    streamed: bool
    reason: str
    decodes: bool = False


def choose(
    source: Source,
    needs_data: bool,
    dtype: torch.dtype | None,
    device: str | None,
    wanted: bool | None,
    processes: int = 1,
    decodes: bool = False,
) -> Choice:
    """How the source is opened. wanted: what the user said, or None. processes: that work on this machine; each needs
    the memory, but has a GPU of its own. decodes: only the autoencoder is worked on.

    Without data every weight is needed once, so streaming costs little. With data the model runs many times, and is
    loaded whole where it fits.
    """
    if wanted is not None:
        return Choice(wanted, "as asked for", decodes)
    why = not_streamable(source)
    if why is not None:
        return Choice(False, f"not streamable: {why}")
    if decodes:
        return Choice(True, "the recipe works on the autoencoder alone, which is loaded", decodes)
    if not needs_data:
        return Choice(True, "the recipe needs no data, so each weight is needed once")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights = weight_bytes(source, dtype or default_dtype(device))
    copies = processes
    if torch.device(device).type == "cuda":
        copies, loaded, main = 1, processes * weights, free_memory()
        if loaded > main:  # on their way to the device
            words = f"{loaded / 1e9:.1f} GB of weights pass through main memory, {main / 1e9:.1f} GB are free"
            return Choice(True, words)
    needed = int(HEADROOM * copies * weights)
    free = free_bytes(device)
    words = f"needs about {needed / 1e9:.1f} GB with its activations, {free / 1e9:.1f} GB are free"
    return Choice(needed > free, f"the whole pipeline {words}")


def open_pipeline(source: Source, choice: Choice, dtype: torch.dtype | None, device: str | None) -> Any:
    """The pipeline, whole or streamed. Raises AttarError as `load_pipeline` and `streamed_pipeline` do."""
    if choice.streamed:
        return streamed_pipeline(source, dtype=dtype, device=device, decodes=choice.decodes)
    return load_pipeline(source, dtype=dtype, device=device)


def weight_bytes(source: Source, dtype: torch.dtype) -> int:
    """What the pipeline's weights take when all of them are loaded in `dtype`."""
    assert source.folder is not None
    parts = [path for path in source.folder.iterdir() if path.is_dir()]
    return dtype.itemsize * sum(Shards(part).values() for part in parts)


def free_bytes(device: str) -> int:
    """Memory that can be had on a device: of the GPU, or of the machine within the limits of its container."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()
