"""Clipping factors of activations for each group of denoising steps, from the recipe to the loaded pipeline."""

import pytest
import torch
from support import pipelines
from support.commands import contents

import attar
from attar import finetuning
from attar.errors import AttarError
from attar.quantize.finetune import Finetuner
from attar.quantize.plan import LayerPlan
from attar.recipe import load_recipe
from attar.runtime.layers import packed_layers
from attar.runtime.step_groups import step_groups_of
from attar.settings import block_settings, layer_size

GROUPS = {"quantize.step_groups": 2, "quantize.clip_by_group": True}
TRAINED = {
    **{"trace.prompts": 2, "finetune.steps": 6, "finetune.batch_size": 2, "finetune.adapter_rank": 2},
    **{"finetune.clip_lr": 0.1, "finetune.gradient_checkpointing": True},
}
CALIBRATED = {
    "trace.prompts": 2,
    "select.count": 4,
    "select.policy": "uniform_steps",
    "reconstruct.epochs": 1,
}
POLISHED = {**CALIBRATED, "finetune.steps": 4, "finetune.batch_size": 2, "finetune.clip_lr": 1e-2}
RUNS = {
    "trained whole": ("efficientdm", TRAINED),
    "with bits by groups too": ("efficientdm", {**TRAINED, "quantize.acts": [8, 4]}),
    "block by block": ("attar-ptq", CALIBRATED),
    "and trained behind it": ("attar-ptq", {**POLISHED, "finetune.scale_lr": 1e-3}),
}


def compressed(recipe, overrides, **options):
    return attar.compress(
        pipelines.make("wan"), recipe, prompts=pipelines.PROMPTS[:2], overrides={**GROUPS, **overrides},
        generation={**pipelines.CASES["wan"].generation, "num_inference_steps": 4}, **options,
    )  # fmt: skip


@pytest.mark.slow(but=["block by block", "trained whole"])
@pytest.mark.parametrize("run", RUNS)
def test_pairs_are_learned_kept_and_followed(run, tmp_path):
    pipe = compressed(*RUNS[run])
    pairs = [
        layer.act_clip for layer in packed_layers(pipe.transformer).values() if layer.act_clip is not None
    ]
    assert pairs and all(pair.shape == (2, 2) for pair in pairs)
    assert sum(not torch.equal(*pair) for pair in pairs) > len(pairs) / 2
    assert step_groups_of(pipe.transformer).count == 2
    assert pipe.transformer.config["quantization_config"].to_dict()["format_version"] == 8
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    pipelines.assert_same_model(pipe, again, "wan")


def test_a_run_stopped_while_it_trains_goes_on_to_the_same_bytes(monkeypatch, tmp_path):
    class Stopped(Exception):
        pass

    whole = compressed("efficientdm", TRAINED)
    train = Finetuner.train

    def stopped(self, after):
        def then(tuner, loss):
            after(tuner, loss)
            if tuner.step == 3:
                raise Stopped

        train(self, then)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "train", stopped)
        patch.setattr(finetuning, "SAVE_SECONDS", -1.0)
        with pytest.raises(Stopped):
            compressed("efficientdm", TRAINED, workspace=tmp_path / "work")
    assert list((tmp_path / "work").rglob("finetune.safetensors"))
    for _ in range(2):  # taken up, and once more when all is there
        again = compressed("efficientdm", TRAINED, workspace=tmp_path / "work")
        first, second = whole.transformer.state_dict(), again.transformer.state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
        assert step_groups_of(again.transformer) == step_groups_of(whole.transformer)


@pytest.mark.slow
def test_the_command_is_killed_and_resumed_to_the_same_bytes(commands, wan_folder, tmp_path):
    settings = {**GROUPS, **TRAINED}
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={str(value).lower()}")]
    command = ("compress", wan_folder, "--recipe", "efficientdm", *options, "-o")
    whole, out = tmp_path / "whole" / "small", tmp_path / "small"
    assert commands.run(*command, whole) == 0
    assert commands.run_killed(*command, out, out=out, writes=(5,)) >= 1
    assert contents(out) == contents(whole)
    assert pipelines.generate(attar.load(out), "wan").isfinite().all()


@pytest.mark.parametrize(
    ("recipe", "overrides", "says"),
    [
        ("efficientdm", {"quantize.clip_by_group": True}, "clip_by_group needs groups of steps"),
        ("efficientdm", {**GROUPS, "quantize.act_clip": False}, "clip_by_group needs act_clip"),
        ("efficientdm", {**GROUPS, "quantize.acts": 16}, "clip_by_group needs rounded activations"),
        ("efficientdm", {"quantize.step_groups": 2}, "finetune trains all steps with the same bits"),
        ("efficientdm", {**GROUPS, "finetune.clip_lr": 0}, "needs something that trains clipping"),
        ("hadamard", {**GROUPS, "quantize.act_clip": True}, "needs something that trains clipping"),
        ("attar-ptq", {**GROUPS, "reconstruct.batch_size": 2}, "set reconstruct.batch_size to 1"),
        ("efficientdm", {**GROUPS, "finetune.relation": {"weight": 1.0}}, "finetune.relation.window to 1"),
    ],
)
def test_recipes_that_cannot_be_are_refused(recipe, overrides, says):
    with pytest.raises(AttarError, match=says):
        load_recipe(recipe, overrides)


def test_a_group_without_samples_is_refused():
    with pytest.raises(AttarError, match=r"no calibration sample is of group \d of 2 groups"):
        compressed("attar-ptq", {**CALIBRATED, "select.count": 1})


def test_recipes_without_it_are_as_before_and_those_with_it_say_so():
    plain, grouped = load_recipe("efficientdm"), load_recipe("efficientdm", GROUPS)
    assert "clip_by_group" not in plain.model_dump()["quantize"]
    assert grouped.model_dump()["quantize"]["clip_by_group"] and load_recipe(grouped.model_dump()) == grouped
    plan = LayerPlan("a", "self_attn.q", 4, 4, None, 64, 64, True)
    assert layer_size(plan, grouped).packed == layer_size(plan, plain).packed + 8
    assert "activation clipping of 2 groups of steps" in block_settings(grouped).treatment(plan)
    assert block_settings(plain).clip_groups is None and block_settings(grouped).clip_groups == 2
    assert (
        grouped.identity != load_recipe("efficientdm", {"finetune": None, "quantize.step_groups": 2}).identity
    )


def test_dry_run_and_benchmark_know_the_groups(cli, small_limit, wan_folder):
    options = [
        f"{key}={str(value).lower()}"
        for key, value in {**GROUPS, "trace.prompts": 2, "select.count": 4}.items()
    ]
    words = ("--recipe", "attar-ptq", *(word for option in options for word in ("--set", option)))
    done = cli("compress", wan_folder, *words, "--dry-run")
    assert done.code == 0, done.err
    done = cli("bench", wan_folder, "--tokens", "8", *words)
    assert done.code == 0, done.err
