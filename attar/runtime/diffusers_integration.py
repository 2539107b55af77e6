"""Loading and saving of packed models by diffusers itself: `from_pretrained`, `save_pretrained`.

diffusers has no call to register a quantizer; `register` adds ours to the two tables of its loader.
"""

from __future__ import annotations

import os
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from attar.errors import AttarError
from attar.runtime import attention_backend
from attar.runtime.aligned import align
from attar.runtime.checkpoint import QUANT_METHOD, check_config, quantization_config_of, replace_linears
from attar.runtime.gelu import fuse_gelu
from attar.runtime.integrity import header_metadata, sort_header, tensor_checksums, verify_files
from attar.runtime.layers import packed_layers


class AttarMethod(str, Enum):
    """The name of the method, in the form that diffusers expects."""

    ATTAR = QUANT_METHOD


class AttarConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json as the object that diffusers passes around."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = AttarMethod.ATTAR  # type: ignore[assignment]
        self.fields = check_config({"quant_method": QUANT_METHOD, **fields})

    def to_dict(self) -> dict[str, Any]:
        return dict(self.fields)

    def __repr__(self) -> str:
        return f"AttarConfig(recipe={self.fields['recipe']!r}, layers={len(self.fields['layers'])})"


class AttarQuantizer(DiffusersQuantizer):
    """Puts packed layers into the empty model before the weights are read, and checks the result."""

    requires_calibration = True  # a float model cannot be quantized while it is loaded
    use_keep_in_fp32_modules = True  # the float layers keep the dtypes that they have in the original model

    def __init__(self, quantization_config: AttarConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.modules_to_not_convert = quantization_config.fields["modules_to_not_convert"]
        self._buffers: set[str] = set()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise AttarError(
                "a packed model cannot be offloaded to disk: float32 scales would be rounded",
                fix="Use device_map without disk, enable_model_cpu_offload or group offloading",
            )

    def get_special_dtypes_update(
        self, model: ModelMixin, torch_dtype: torch.dtype | None
    ) -> dict[str, torch.dtype]:
        # Without a dtype every tensor counts as it is; accelerate takes no None here.
        return {} if torch_dtype is None else super().get_special_dtypes_update(model, torch_dtype)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        verify_files(checkpoint_files, self.quantization_config.to_dict())
        return loaded_keys

    def _process_model_before_weight_loading(self, model: ModelMixin, **kwargs: Any) -> None:
        replace_linears(model, self.quantization_config.to_dict())
        self._buffers = {
            f"{name}.{buffer}"
            for name, layer in packed_layers(model).items()
            for buffer, _ in layer.named_buffers()
        }

    def check_if_quantized_param(
        self,
        model: ModelMixin,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        return param_name in self._buffers

    def check_quantized_param_shape(self, param_name: str, expected: Tensor, found: Tensor) -> bool:
        if expected.shape != found.shape:
            raise AttarError(
                f"{param_name!r} has shape {tuple(found.shape)}, the model needs {tuple(expected.shape)}",
                fix="The checkpoint belongs to another model configuration",
            )
        return True

    def create_quantized_param(
        self,
        model: ModelMixin,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # `param_value` was already cast to torch_dtype; the state dict still has the scale as it was saved.
        value = state_dict[param_name]
        expected = model.get_buffer(param_name).dtype
        if value.dtype != expected:
            raise AttarError(f"{param_name!r} is {value.dtype}, must be {expected}")
        set_module_tensor_to_device(model, param_name, target_device, value=value)

    def update_missing_keys(self, model: ModelMixin, missing_keys: list[str], prefix: str) -> list[str]:
        if missing_keys:
            raise AttarError(
                f"tensor {min(missing_keys)!r} is missing from the checkpoint",
                where=type(model).__name__,
                fix="Copy or download the checkpoint again",
            )
        return missing_keys

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: Any) -> ModelMixin:
        for name, layer in packed_layers(model).items():
            layer.settle(name)
        align(model)
        # The flag's effect in diffusers is to forbid `.to(dtype)`, which packed layers survive.
        model.is_quantized = False  # type: ignore[assignment]
        use_kernels(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if not safe_serialization:
            raise AttarError(
                "a packed model is saved as safetensors only, whose checksums loading asks for",
                fix="Leave out safe_serialization=False",
            )
        if any(".base_layer." in name for name in state_dict):
            raise AttarError("a LoRA is attached to the packed model", fix="Unload it before saving")
        return state_dict, header_metadata(tensor_checksums(state_dict), self.quantization_config.to_dict())

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside the packed layers

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Makes diffusers recognise `quant_method: attar`. Called by `import attar`; repeating it is harmless."""
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = AttarQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = AttarConfig
    attention_backend.register()


def mark_compressed(model: ModelMixin, recipe: str = "custom") -> ModelMixin:
    """Tells a diffusers model that its layers are packed, so that `save_pretrained` writes a full checkpoint.

    In place; call it again after changing layers. Raises AttarError when no layer is packed.
    """
    config = AttarConfig(**quantization_config_of(model, recipe))
    model.hf_quantizer = AttarQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]
    kept = {
        key: value for key, value in model.config.items() if key != "_name_or_path"
    }  # may be a private path
    model._internal_dict = type(model.config)({**kept, "quantization_config": config})
    use_kernels(model)
    return model


def use_kernels(model: nn.Module) -> None:
    """Lets attar compute what it can of a packed model, or a part of one, beside the linears. In place."""
    attention_backend.use_fast_attention(model)
    fuse_gelu(model)


def save_transformer(
    model: ModelMixin, folder: str | os.PathLike[str], recipe: str | None = None, max_shard_size: str = "10GB"
) -> Path:
    """Saves a packed model as a diffusers folder: complete under its name, or not there at all.

    `recipe` defaults to the name that the model already carries. An existing folder is replaced at the end.
    """
    folder = Path(folder)
    if recipe is None:
        quantizer: Any = getattr(model, "hf_quantizer", None)
        recipe = "custom" if quantizer is None else str(quantizer.quantization_config.fields["recipe"])
    mark_compressed(model, recipe)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size=max_shard_size)
    for path in partial.glob("*.safetensors"):
        sort_header(path)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return folder
