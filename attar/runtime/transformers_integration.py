"""Loading and saving of packed text encoders by transformers itself, in the checkpoint format of the transformers.

What differs from diffusers: a missing tensor is only warned of there, layers that look uninitialised are filled with
random numbers, and a config is an ordinary object with a text as its method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from attar.errors import AttarError
from attar.runtime.aligned import align
from attar.runtime.checkpoint import QUANT_METHOD, check_config, quantization_config_of, replace_linears
from attar.runtime.integrity import header_metadata, tensor_checksums, verify_files
from attar.runtime.layers import PackedLinear, packed_layers


class AttarTextConfig(QuantizationConfigMixin):
    """`quantization_config` of a text encoder's config.json as the object that transformers passes around."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.fields = check_config({"quant_method": QUANT_METHOD, **fields})

    def to_dict(self) -> dict[str, Any]:
        return dict(self.fields)


class AttarTextQuantizer(HfQuantizer):
    """Puts packed layers into the empty model before the weights are read, and checks the result."""

    requires_calibration = True  # a float model cannot be quantized while it is loaded

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise AttarError(
                "a packed model cannot be offloaded to disk: float32 scales would be rounded",
                fix="Use device_map without disk, or offloading to the CPU",
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> Any:
        replace_linears(model, self.quantization_config.to_dict())
        _keep_uninitialised(model)
        stored = verify_files(checkpoint_files or (), self.quantization_config.to_dict())
        missing = sorted(
            {f"{name}.{key}" for name, layer in packed_layers(model).items() for key in layer.state_dict()}
            - set(stored)
        )
        if missing:
            raise AttarError(
                f"tensor {missing[0]!r} is missing from the checkpoint",
                where=type(model).__name__,
                fix="Copy or download the checkpoint again",
            )
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in packed_layers(model).items():
            layer.settle(name)
            if _is_kept_wide(model, name, layer.compute_dtype):
                layer.compute_dtype = torch.float32
        align(model)
        _spare_weights(model)
        # The flag's effect in transformers is to forbid `.half()` and `.float()`, which packed layers survive.
        model.is_quantized = False
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        tied = model.all_tied_weights_keys
        state = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
        return state, header_metadata(tensor_checksums(state), self.quantization_config.to_dict())

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside the packed layers

    @property
    def is_compileable(self) -> bool:
        return True


def _is_kept_wide(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether the model keeps that layer in float32 for numbers of `dtype`, as T5 does its `wo`, whose outputs are
    larger than float16 goes: transformers does so with weights, and a packed layer has none."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return dtype != torch.float32 and bool(kept.intersection(name.split(".")))


def register() -> None:
    """Makes transformers recognise `quant_method: attar`. Called by `import attar`; repeating it is harmless."""
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = AttarTextQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = AttarTextConfig


def mark_text_encoder(model: Any, recipe: str = "custom") -> Any:
    """Tells a transformers model that its layers are packed, so that `save_pretrained` writes a full checkpoint.

    In place. Raises AttarError when no layer is packed.
    """
    config = AttarTextConfig(**quantization_config_of(model, recipe))
    model.hf_quantizer = AttarTextQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    _spare_weights(model)
    return model


def _spare_weights(model: nn.Module) -> None:
    """Lets no part of a packed model compute the weight of a packed layer."""
    from attar.runtime.t5 import spare_weights  # loads model code, which `import attar` should not

    spare_weights(model)


def _keep_uninitialised(model: nn.Module) -> None:
    """Keeps transformers from giving packed layers random weights, for which it would unpack them one by one.

    It asks the module that holds a layer, so those are marked too, unless they have buffers of their own to fill.
    """
    for module in model.modules():
        holds = any(isinstance(child, PackedLinear) for child in module.children())
        if isinstance(module, PackedLinear) or (holds and not module._buffers):
            module._is_hf_initialized = True  # type: ignore[assignment]
