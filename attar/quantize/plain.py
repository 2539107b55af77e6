"""Whether a model is as its library made it, which is asked before anything is traced or changed."""

from __future__ import annotations

from torch import Tensor, nn

from attar.errors import AttarError
from attar.quantize.learned_codes import LearnedCodes
from attar.quantize.linear import QuantizedLinear
from attar.quantize.polish import ScaledCodes


def check_plain(model: nn.Module) -> None:
    """Raises AttarError for a model with the layers of an interrupted compression, with a LoRA, or with weights in
    another library's codes, and for one that is compiled."""
    for name, module in model.named_modules():
        where = ".".join(filter(None, (type(model).__name__, name)))
        if isinstance(module, (QuantizedLinear, LearnedCodes, ScaledCodes)):
            raise AttarError(
                "a compression that did not end has left its layers in the model",
                where=where,
                fix="Load the model anew",
            )
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise AttarError(
                "the model is compiled", where=where, fix="Compress it first, and compile what comes out"
            )
        if hasattr(module, "base_layer"):
            raise AttarError(
                "a LoRA is attached to the model",
                where=where,
                fix="Make it part of the weights, pipe.fuse_lora() and pipe.unload_lora_weights(), or unload it",
            )
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            _check_weight(module, where)


def _check_weight(layer: nn.Linear | nn.Conv2d, where: str) -> None:
    """A subclass of tensors, or anything but floating point of 16 bits and more, is what other libraries make."""
    weight = layer.weight
    floating = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
    if not floating or weight.element_size() < 2:
        kind = str(getattr(weight, "dtype", "no tensor")).removeprefix("torch.")
        raise AttarError(
            f"the weights are quantized already ({type(weight).__name__}, {kind})",
            where=where,
            fix="Start from the model in float32, bfloat16 or float16",
        )
