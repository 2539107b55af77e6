"""What the traced steps cannot give is refused before they are traced, or before the first component is touched."""

import json
from itertools import pairwise

import pytest
import torch
from support import pipelines

import attar
from attar.calibration.store import TraceStore
from attar.calibration.trace import trace_pipeline
from attar.errors import AttarError
from attar.measuring import _places
from attar.recipe import load_recipe

PTQ = {"trace.prompts": 2, "select.count": 3, "reconstruct.epochs": 1}
TRAINED = {"trace.prompts": 2, "finetune.steps": 2, "finetune.adapter_rank": 2}
RELATION = {**TRAINED, "finetune.batch_size": 8}


def options(overrides):
    return [word for key, value in overrides.items() for word in ("--set", f"{key}={json.dumps(value)}")]


@pytest.mark.parametrize(
    ("recipe", "overrides", "says"),
    [
        ("attar-ptq", {**PTQ, "select.cap_per_prompt": 1}, "finds 2 of 3 samples"),
        (
            "attar-ptq",
            {**PTQ, "select.policy": "one_prompt_all_steps", "select.count": 5},
            "finds 4 of 5 samples",
        ),
        ("efficientdm", {**TRAINED, "finetune.local": ["nonsense"]}, "no quantized layer is called so"),
        ("mpq-dm", {**RELATION, "finetune.relation.window": 8}, "as many traced steps as a window, 8"),
        ("mpq-dmv2", {**RELATION, "finetune.relation.memory": 3}, "smaller than the 8 traced steps"),
        (
            "attar-ptq",
            {**PTQ, "quantize.step_groups": 6, "quantize.acts": [8, 8, 8, 4, 4, 4]},
            "4 steps cannot be cut",
        ),
    ],
)
def test_by_the_dry_run_and_before_the_trace(recipe, overrides, says, cli, tmp_path):
    folder = pipelines.save(tmp_path / "wan", steps=4)
    command = ("compress", folder, "--recipe", recipe, *options(overrides))
    assert says in cli(*command, "--dry-run").message
    assert says in cli(*command, "-o", tmp_path / "small").message
    assert not list(tmp_path.rglob("prompt-*"))


@pytest.mark.parametrize(
    ("recipe", "overrides", "says"),
    [
        ("attar-ptq", {**PTQ, "select.count": 5}, "finds 2 of 5 samples"),
        ("rtn", {"quantize.step_groups": 3, "quantize.acts": [8, 6, 4]}, "1 steps cannot be cut into 3"),
        ("mpq-dm", {**RELATION, "finetune.relation.window": 4}, "as many traced steps as a window, 4"),
    ],
)
def test_a_short_expert_is_found_before_the_long_one_is_compressed(recipe, overrides, says, tmp_path):
    pipe = pipelines.make("wan22")
    pipe.register_to_config(boundary_ratio=0.3)
    generation = {**pipelines.CASES["wan22"].generation, "num_inference_steps": 6}
    with pytest.raises(AttarError, match=says) as refused:
        attar.compress(
            pipe, recipe, overrides=overrides, prompts=pipelines.PROMPTS[:2], generation=generation,
            workspace=tmp_path / "work",
        )  # fmt: skip
    assert "transformer_2" in str(refused.value)
    assert {p.name for p in (tmp_path / "work").iterdir() if p.is_dir()} == {"trace"}


@pytest.mark.parametrize("groups, samples, steps", [(4, 4, 5), (3, 3, 4), (6, 7, 9)])
def test_every_group_of_steps_is_measured(groups, samples, steps, tmp_path):
    store = TraceStore(tmp_path)
    pipe = pipelines.make("wan")
    trace_pipeline(
        pipe, pipelines.PROMPTS[:1], store, steps=steps, guidance_scale=1.0, seed=0,
        generation=pipelines.CASES["wan"].generation,
    )  # fmt: skip
    length, chosen = _places(store, "transformer", 1, samples, True, groups)
    assert length == steps and len(set(chosen)) == len(chosen)
    borders = [k * steps // groups for k in range(groups + 1)]
    for first, end in pairwise(borders):
        assert any(first <= step < end for _, step in chosen), chosen
    spread = _places(store, "transformer", 1, samples, True, 1)[1]
    assert chosen[: len(spread)] == spread  # what the samples were without groups


def test_texts_of_unequal_length_say_what_to_set():
    pipe = pipelines.make("wan")
    encode = pipe.encode_prompt

    def uneven(prompt, *args, **kwargs):
        text, negative = encode(prompt, *args, **kwargs)
        cut = text.shape[1] - (prompt == pipelines.PROMPTS[0])
        return text[:, :cut], negative[:, :cut]

    pipe.encode_prompt = uneven
    case = pipelines.CASES["wan"]
    call = {**case.generation, "num_inference_steps": case.steps}
    few = {"trace.prompts": 2, "finetune.steps": 8, "finetune.batch_size": 4}
    with pytest.raises(AttarError, match=r"different shapes .*\[finetune.batch_size\]. Set it to 1, or"):
        attar.compress(
            pipe, "quantized-distillation", overrides=few, prompts=pipelines.PROMPTS[:2], generation=call
        )


@pytest.mark.parametrize("bits", [5, 7])
def test_rows_of_several_bits_say_which_bits_the_weights_have(bits):
    says = f"rows around {bits} bits would have {bits + 1}, and .*Choose other bits for the weights"
    with pytest.raises(AttarError, match=says):
        load_recipe("mpq-dmv2", {"quantize.weights": bits})


def test_a_block_that_changes_nothing(tmp_path):
    """As one that is pruned: figures are finite, also on disk."""
    pipe = pipelines.make("wan")
    block = pipe.transformer.blocks[1]
    with torch.no_grad():
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            layer.weight.zero_(), layer.bias.zero_()
    case = pipelines.CASES["wan"]
    small = attar.compress(
        pipe, "attar-ptq", overrides={**PTQ, "allocate": {"budget": "same", "samples": 2, "bits": [3, 4, 5]}},
        prompts=pipelines.PROMPTS[:2], generation={**case.generation, "num_inference_steps": case.steps},
        workspace=tmp_path / "work",
    )  # fmt: skip
    found = small.attar_compression.components["transformer"]["blocks"][1]
    assert found["error_before"] == found["error_after"] == 0
    assert "NaN" not in "".join(p.read_text() for p in (tmp_path / "work").rglob("*.json"))
