"""Pipelines that are larger than a device: what does not run waits in main memory. diffusers has the machinery."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from attar.errors import AttarError, reason

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
    """The pipeline, which is in main memory, computes on the device from now on.

    Raises AttarError for a pipeline that diffusers does not offload in that way.
    """
    try:
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        else:
            onload, here = torch.device(device), torch.device("cpu")
            pipe.enable_group_offload(onload_device=onload, offload_device=here, offload_type="leaf_level")
    except ValueError as error:
        (other,) = set(get_args(Offload)) - {offload}
        raise AttarError(
            f"the pipeline is not offloaded by {offload} ({reason(error)})",
            where=type(pipe).__name__,
            fix=f"Use {other}, or leave offloading out",
        ) from error


def is_offloaded(pipe: Any) -> bool:
    """Whether weights of the pipeline come to a device while they run, by hooks of diffusers or accelerate; what attar
    streams does not count."""
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    for part in pipe.components.values():
        if isinstance(part, nn.Module) and not hasattr(part, "attar_weights"):
            hooks = [getattr(module, "_hf_hook", None) for module in part.modules()]
            if any(hook is not None and getattr(hook, "offload", True) for hook in hooks):
                return True
            if _is_group_offload_enabled(part):
                return True
    return False


def computes_on(pipe: Any) -> torch.device:
    """The device on which a pipeline computes, wherever its weights are at the moment."""
    return torch.device(getattr(pipe, "_execution_device", pipe.device))
