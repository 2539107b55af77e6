"""Pipelines that are larger than a device: what does not run waits in main memory. diffusers has the machinery."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from attar.errors import AttarError

# "model": the whole of a component comes to the device while it runs. "group": a layer at a time, which needs least
# memory there and is slowest.
Offload = Literal["model", "group"]


def check_offload(offload: str, device: str, alone: bool = False) -> None:
    """Raises AttarError for an unknown way, on a CPU, and for a component without a pipeline."""
    if offload not in get_args(Offload):
        raise AttarError(
            f"unknown way to offload {offload!r}", fix=f"Use one of {', '.join(get_args(Offload))}"
        )
    if torch.device(device).type == "cpu":
        raise AttarError(
            "nothing is offloaded from the CPU, where all of the pipeline is", where=device,
            fix="Leave offloading out, or name the GPU's device",
        )  # fmt: skip
    if alone:
        raise AttarError("an autoencoder alone is not offloaded", fix="Leave offloading out")


def keep_in_main_memory(pipe: Any, device: str, offload: str) -> None:
    """The pipeline, which is in main memory, computes on the device from now on."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        onload, here = torch.device(device), torch.device("cpu")
        pipe.enable_group_offload(onload_device=onload, offload_device=here, offload_type="leaf_level")


def computes_on(pipe: Any) -> torch.device:
    """The device on which a pipeline computes, wherever its weights are at the moment."""
    return torch.device(getattr(pipe, "_execution_device", pipe.device))
