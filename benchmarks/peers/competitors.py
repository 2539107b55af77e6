"""Every library that people quantize a diffusion transformer with today, behind one function each.

All of them get the same task: the linears of the transformer blocks, and nothing else, with the library's own defaults
for its format. Libraries that calibrate get the same full-precision calls.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BLOCKS = "blocks."  # names of a transformer's linears that are quantized start so


@dataclass
class Task:
    """What a competitor is given: a transformer that is its own, and calls to calibrate with.

    compress: attar on that transformer, from (recipe, weight bits, activation bits).
    """

    transformer: nn.Module
    calls: Sequence[dict[str, Any]]
    compress: Callable[[str, int, int], nn.Module]

    def linears(self, inside: bool = True) -> list[str]:
        """Names of the linears in the blocks, or of those outside."""
        names = (name for name, module in self.transformer.named_modules() if isinstance(module, nn.Linear))
        return [name for name in names if name.startswith(BLOCKS) == inside]

    @torch.no_grad()
    def calibrate(self, model: nn.Module | None = None) -> None:
        """Runs every calibration call."""
        model = model or self.transformer
        for call in self.calls:
            model(**call)


@dataclass(frozen=True)
class Competitor:
    """One row of the table.

    distribution: the package whose version is named. simulated: the library computes in floating point what another
    machine's kernels would compute in integers, so its speed and memory here say nothing.
    """

    name: str
    distribution: str
    make: Callable[[Task], nn.Module]
    dtype: torch.dtype = torch.float32
    simulated: bool = False
    compiled: bool = False


def plain(task: Task) -> nn.Module:
    return task.transformer


def torchao(config: Callable[[Any], Any]) -> Callable[[Task], nn.Module]:
    """config: from the module torchao.quantization to the configuration object."""

    def make(task: Task) -> nn.Module:
        import torchao.quantization as library

        def inside(module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear) and name.startswith(BLOCKS)

        library.quantize_(task.transformer, config(library), filter_fn=inside)
        return task.transformer

    return make


def quanto(weights: str, acts: str | None = None) -> Callable[[Task], nn.Module]:
    """weights, acts: names of quanto's types. Activations are static, with scales from calibration."""

    def make(task: Task) -> nn.Module:
        from optimum import quanto as library

        types = {"weights": getattr(library, weights), "activations": acts and getattr(library, acts)}
        library.quantize(
            task.transformer, include=task.linears(), **types
        )  # norms too, were they not left out
        if acts is not None:
            with library.Calibration():
                task.calibrate()
        library.freeze(task.transformer)
        return task.transformer

    return make


def modelopt(config: str) -> Callable[[Task], nn.Module]:
    """config: the name of one of ModelOpt's configurations, restricted to the blocks."""

    def make(task: Task) -> nn.Module:
        import modelopt.torch.quantization as library

        settings = copy.deepcopy(getattr(library, config))
        for entry in settings["quant_cfg"]:
            if entry.get("enable", True) and entry["quantizer_name"].startswith("*"):
                entry["quantizer_name"] = BLOCKS + entry["quantizer_name"]
        return library.quantize(task.transformer, settings, task.calibrate)

    return make


def openvino(task: Task) -> nn.Module:
    """NNCF's int8 post-training quantization, run by OpenVINO."""
    import nncf
    import openvino as library

    wrapped = _Positional(task.transformer, list(task.calls[0]))
    examples = [wrapped.pack(call) for call in task.calls]
    model = library.convert_model(wrapped, example_input=examples[0])
    outside = [f".*{name}/.*" for name in task.linears(inside=False)]
    scope = nncf.IgnoredScope(patterns=outside, validate=False)
    dataset = nncf.Dataset([[t.numpy() for t in example] for example in examples])
    quantized = nncf.quantize(
        model, dataset, model_type=nncf.ModelType.TRANSFORMER, ignored_scope=scope, subset_size=len(examples)
    )
    core = library.Core()
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(quantized, "CPU", threads)
    return _OpenVINO(task.transformer, compiled, wrapped, _integer_bytes(quantized))


def _integer_bytes(model: Any) -> int:
    """Bytes of an OpenVINO model's integer weights; only the blocks have some."""
    constants = (op for op in model.get_ops() if op.get_type_name() == "Constant")
    return sum(op.get_byte_size() for op in constants if op.get_element_type().to_string() in ("i8", "u8"))


class _Positional(nn.Module):
    """A transformer whose tensors come in one fixed order."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.tensors: list[str] = []
        self.constants: dict[str, Any] = {}

    def pack(self, call: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        self.tensors = [name for name in self.names if isinstance(call.get(name), torch.Tensor)]
        self.constants = {n: v for n, v in call.items() if n not in self.tensors and n != "return_dict"}
        return tuple(call[name] for name in self.tensors)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.tensors, tensors, strict=True))
        return self.model(**named, **self.constants, return_dict=False)[0]


class _OpenVINO(nn.Module):
    """A compiled OpenVINO model in the place of the diffusers transformer."""

    def __init__(self, model: nn.Module, compiled: Any, wrapped: _Positional, linear_bytes: int) -> None:
        super().__init__()
        self.config, self.dtype, self.device = model.config, torch.float32, torch.device("cpu")
        self._compiled, self._names, self.linear_bytes = compiled, wrapped.tensors, linear_bytes

    def cache_context(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def forward(self, *, return_dict: bool = True, **call: Any) -> tuple[torch.Tensor]:
        if return_dict:
            raise TypeError("the compiled model returns tuples")
        found = self._compiled([call[name].numpy() for name in self._names])[0]
        return (torch.from_numpy(found),)


def attar(recipe: str, weights: int, acts: int) -> Callable[[Task], nn.Module]:
    """One of attar's recipes at these bits; 16 bits of activations are floating point."""
    return lambda task: task.compress(recipe, weights, acts)


BF16 = torch.bfloat16
INT8_DYNAMIC = torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig())
TORCHAO_INT4_VALUES = torchao(lambda q: q.IntxWeightOnlyConfig(torch.int4, q.PerGroup(128)))
COMPETITORS = (
    Competitor("fp32", "torch", plain),
    Competitor("bf16", "torch", plain, BF16),
    Competitor("bf16, compiled", "torch", plain, BF16, compiled=True),
    Competitor("attar attar-ptq W8A8", "attar", attar("attar-ptq", 8, 8), BF16),
    Competitor("attar attar-ptq W4A8", "attar", attar("attar-ptq", 4, 8), BF16),
    Competitor("attar attar-ptq W4A6", "attar", attar("attar-ptq", 4, 6), BF16),
    Competitor("attar rtn W8A8", "attar", attar("rtn", 8, 8), BF16),
    Competitor("attar attar-ptq W8A8, compiled", "attar", attar("attar-ptq", 8, 8), BF16, compiled=True),
    Competitor("attar rtn W8A8, compiled", "attar", attar("rtn", 8, 8), BF16, compiled=True),
    Competitor("attar rtn W4A16", "attar", attar("rtn", 4, 16), BF16),
    Competitor("attar attar-ptq W4A16", "attar", attar("attar-ptq", 4, 16), BF16),
    Competitor("torchao int8 dynamic", "torchao", INT8_DYNAMIC, BF16),
    Competitor("torchao int8 dynamic, compiled", "torchao", INT8_DYNAMIC, BF16, compiled=True),
    Competitor("torchao int8 weight-only", "torchao", torchao(lambda q: q.Int8WeightOnlyConfig()), BF16),
    Competitor("torchao int4 weight-only", "torchao", torchao(lambda q: q.Int4WeightOnlyConfig()), BF16),
    Competitor("torchao int4 weights in int8", "torchao", TORCHAO_INT4_VALUES, BF16),
    Competitor("quanto int8 weights", "optimum-quanto", quanto("qint8"), BF16),
    Competitor("quanto int4 weights", "optimum-quanto", quanto("qint4"), BF16),
    Competitor("quanto int8 weights and activations", "optimum-quanto", quanto("qint8", "qint8"), BF16),
    Competitor(
        "ModelOpt INT8 SmoothQuant", "nvidia-modelopt", modelopt("INT8_SMOOTHQUANT_CFG"), simulated=True
    ),
    Competitor("ModelOpt INT4 AWQ", "nvidia-modelopt", modelopt("INT4_AWQ_CFG"), simulated=True),
    Competitor("ModelOpt W4A8 AWQ", "nvidia-modelopt", modelopt("W4A8_AWQ_BETA_CFG"), simulated=True),
    Competitor(
        "ModelOpt NVFP4 SVDQuant", "nvidia-modelopt", modelopt("NVFP4_SVDQUANT_DEFAULT_CFG"), simulated=True
    ),
    Competitor("NNCF int8, OpenVINO", "nncf", openvino),
)
