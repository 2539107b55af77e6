"""Models that are not as their library made them, or were interrupted, are refused before anything is traced."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from support import pipelines
from torch import nn

import attar
from attar.errors import AttarError
from attar.quantize import reconstruct

CASE = pipelines.CASES["wan"]
LEARNED = {"trace.prompts": 2, "select.count": 3, "reconstruct.epochs": 1}


def compress(pipe, recipe="attar-ptq", **options):
    generation = dict(CASE.generation) | {"num_inference_steps": CASE.steps}
    overrides = LEARNED if recipe == "attar-ptq" else {}
    prompts = pipelines.PROMPTS[:2]
    return attar.compress(
        pipe, recipe, overrides=overrides, prompts=prompts, generation=generation, **options
    )


def with_lora(pipe):
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))


def compiled(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compiled_in_place(pipe):
    pipe.transformer.compile(backend="eager")


def compiled_blocks(pipe):
    pipe.transformer.compile_repeated_blocks(backend="eager")


def in_float8(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


class Bytes(nn.Linear):
    """What bitsandbytes makes of a linear: integers where the weight is expected."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter(torch.zeros(linear.weight.shape, dtype=torch.int8), requires_grad=False)


class Wrapped(nn.Parameter):
    """A subclass, as GGUF's and torchao's weights are."""


def in_bytes(pipe):
    attention = pipe.transformer.blocks[0].attn1
    attention.to_q = Bytes(attention.to_q)


def in_a_subclass(pipe):
    attention = pipe.transformer.blocks[0].attn1
    attention.to_q.weight = Wrapped(attention.to_q.weight.detach())


@pytest.mark.parametrize("recipe", ["rtn", "attar-ptq"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_lora, "a LoRA is attached to the model"),
        (compiled, "the model is compiled"),
        (compiled_in_place, "the model is compiled"),
        (compiled_blocks, "the model is compiled"),
        (in_float8, r"quantized already \(Parameter, float8_e4m3fn\)"),
        (in_bytes, r"quantized already \(Parameter, int8\)"),
        (in_a_subclass, r"quantized already \(Wrapped, float32\)"),
    ],
)
def test_refused_before_anything_is_traced(change, told, recipe, tmp_path):
    pipe = pipelines.make("wan")
    change(pipe)
    with pytest.raises(AttarError, match=told) as caught:
        compress(pipe, recipe, workspace=tmp_path / "work")
    assert caught.value.where and caught.value.fix
    assert not (tmp_path / "work").exists() or not any((tmp_path / "work").rglob("*.safetensors"))


def test_a_text_encoder_too():
    pipe = pipelines.make("wan")
    pipe.text_encoder.compile(backend="eager")
    with pytest.raises(AttarError, match="the model is compiled"):
        attar.compress(pipe, "rtn", overrides={"text_encoder.weights": 8})


@pytest.mark.parametrize("with_workspace", [False, True])
def test_a_model_that_was_interrupted_is_not_taken_for_a_whole_one(with_workspace, monkeypatch, tmp_path):
    pipe = pipelines.make("wan")
    workspace = {"workspace": tmp_path / "work"} if with_workspace else {}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reconstruct, "_train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(pipe, **workspace)
    with pytest.raises(AttarError, match="that did not end has left its layers"):
        compress(pipe, **workspace)


@pytest.mark.parametrize("recipe", ["attar-ptq", "qvgen"])
def test_types_come_back_when_it_is_interrupted_before_layers_change(recipe, monkeypatch):
    """A model in bfloat16 is computed with in float32 on the way."""
    pipe = pipelines.make("wan").to(torch.bfloat16)
    before = {name: p.dtype for name, p in pipe.transformer.named_parameters()}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    place = "attar.component.quantize_block" if recipe == "attar-ptq" else "attar.finetuning.input_facts"
    with monkeypatch.context() as patch:
        patch.setattr(place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(pipe, recipe)
    assert {name: p.dtype for name, p in pipe.transformer.named_parameters()} == before
    pipelines.generate(pipe, "wan")


def test_one_prompt_is_one_prompt():
    from attar.conductor import calibration_prompts
    from attar.models.source import Source
    from attar.recipe import load_recipe

    assert calibration_prompts(load_recipe("attar"), Source("x"), "a cat") == ["a cat"]
