"""Which layers get a concatenation as their input, seen in one forward.

The up blocks of a U-Net concatenate the running features with those of a skip connection, whose ranges differ much
(Q-Diffusion, arXiv 2302.04304). Which layers get to see that is watched, not listed: a result of torch.cat is marked
with its parts, operations that keep the channels hand the mark on, and a layer notes the mark of its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attar.errors import AttarError, reason
from attar.models.adapter import evaluating
from attar.models.families import FAMILIES

# functions after which channel c is still made of channel c, normalised with others or not
_KEEPING = {
    F.silu, F.gelu, F.relu, F.dropout, F.group_norm, F.layer_norm, F.interpolate, F.avg_pool2d, F.pad,
    torch.group_norm, torch.layer_norm, Tensor.contiguous, Tensor.to, Tensor.float,
}  # fmt: skip

Parts = tuple[int, tuple[int, ...]]  # (axis, sizes)


class _Marks(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.cat, torch.concat, torch.concatenate):
            pieces = args[0] if args else kwargs["tensors"]
            axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            axis %= result.ndim
            _mark(result, (axis, tuple(piece.shape[axis] for piece in pieces)))
        elif func in _KEEPING and args and isinstance(result, Tensor):
            parts = _parts(args[0])
            if parts is not None and result.shape[parts[0]] == args[0].shape[parts[0]]:
                _mark(result, parts)
        return result


def concatenations(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Convolutions and linears whose input channels are a concatenation: name -> the channels of each part.

    Seen in a model of the same configuration on the meta device, so neither weights nor data are needed. Raises
    AttarError for families of which no example call is known.
    """
    cls: Any = type(model)
    family = FAMILIES.get(cls.__name__)
    if not hasattr(family, "example_call"):
        raise AttarError(
            "which layers get concatenated inputs is not known of this U-Net",
            where=cls.__name__,
            fix="Set quantize.split to false",
        )
    try:
        with torch.device("meta"):
            empty = cls.from_config(model.config)
        with _noted(empty) as found, evaluating(empty), _Marks():
            empty(**family.example_call(empty))  # type: ignore[union-attr]
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
        raise AttarError(
            f"an example call of the model fails ({reason(error)})",
            where=cls.__name__,
            fix="Set quantize.split to false",
        ) from error
    return found


@contextmanager
def _noted(model: nn.Module) -> Iterator[dict[str, tuple[int, ...]]]:
    """Inside, layers note the parts of their inputs."""
    found: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):

            def hook(layer: Any, args: tuple, name: str = name) -> None:
                parts = _parts(args[0])
                channels = 1 if isinstance(layer, nn.Conv2d) else args[0].ndim - 1
                if parts is not None and parts[0] == channels:
                    found[name] = parts[1]

            handles.append(module.register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _mark(tensor: Tensor, parts: Parts) -> None:
    tensor._attar_parts = parts  # type: ignore[attr-defined]


def _parts(value: Any) -> Parts | None:
    return getattr(value, "_attar_parts", None)
