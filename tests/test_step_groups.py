"""Activation bits by groups of denoising steps: calibrated, saved, loaded, and chosen under a budget."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import yaml
from support import pipelines, tiny, unets
from support.block_case import Case
from support.commands import contents

import attar
from attar.models.block import run_block
from attar.quantize.block import quantize_block
from attar.quantize.block_settings import BlockSettings
from attar.quantize.initialize import TransformSettings
from attar.recipe import load_recipe
from attar.runtime.layers import packed_layers
from attar.runtime.step_groups import choose_group, step_groups_of

FEW = {"trace.prompts": 2, "select.count": 3, "reconstruct.epochs": 1, "allocate": None}
BITS = {
    "quantize.step_groups": 2,
    "quantize.acts": [8, 5],
    "quantize.roles": {"*.to_q": {"acts": [4, 8]}},
}


def compressed(pipe, recipe, generation, steps=3, **overrides):
    """The pipeline after three traced steps."""
    few = FEW if load_recipe(recipe).needs_data else {}
    return attar.compress(
        pipe, recipe, prompts=pipelines.PROMPTS[:2], generation={**generation, "num_inference_steps": steps},
        overrides={**few, **overrides},
    )  # fmt: skip


def with_bits_of(model, group):
    """A copy of the model with the bits of one group in all steps."""
    model = copy.deepcopy(model)
    for layer in packed_layers(model).values():
        if layer.act_groups is not None:
            layer.act_bits, layer.act_groups = layer.act_groups[group], None
    return model


@pytest.mark.parametrize("recipe", ["rtn", "attar-ptq"])
def test_equal_bits_in_all_groups_are_no_groups(recipe):
    plain, equal = (
        compressed(pipelines.make("wan"), recipe, tiny.GENERATION, **bits).transformer
        for bits in (
            {"quantize.acts": 5},
            {
                "quantize.acts": [5, 5],
                "quantize.step_groups": 2,
                "quantize.roles": {"ffn.*": {"acts": [5, 5]}},
            },
        )
    )
    first, second = plain.state_dict(), equal.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    configs = [model.config["quantization_config"].to_dict() for model in (plain, equal)]
    assert configs[0] == configs[1] and "step_groups" not in configs[0]
    assert step_groups_of(equal) is None and not equal._forward_pre_hooks


RUNS = {
    "no data": ("wan", "rtn", {}),
    "learned, gptq, shifts": ("wan", "attar", {}),
    "weights under a budget": (
        "wan",
        "attar",
        {"allocate": {"budget": "same", "objective": "latents", "samples": 3}},
    ),
    "learned codes": ("wan", "attar-ptq", {"rounding.epochs": 1}),
    "behind quantized blocks": ("hunyuan", "attar-ptq", {"reconstruct.propagate": "quant"}),
    "two experts": ("wan22", "hadamard", {}),
    "timesteps below one": ("flux", "hadamard", {}),
    "a U-Net": ("sd", "hadamard", {}),
}


@pytest.mark.slow(but=["no data", "learned, gptq, shifts", "two experts", "timesteps below one"])
@pytest.mark.parametrize("run", RUNS)
def test_each_step_has_the_bits_of_its_group(run, tmp_path):
    """In a generation every call of the model is that of one with this group's bits everywhere."""
    name, recipe, options = RUNS[run]
    kind = unets if name in unets.PIPELINES else pipelines
    steps = 3 if kind is unets else pipelines.CASES[name].steps
    generation = unets.GENERATION if kind is unets else pipelines.CASES[name].generation
    pipe = compressed(kind.make(name), recipe, generation, steps, **BITS, **options)
    names = [n for n in ("transformer", "transformer_2", "unet") if getattr(pipe, n, None) is not None]
    seen = []
    for part in (getattr(pipe, n) for n in names):
        groups, found = step_groups_of(part), {layer.act_groups for layer in packed_layers(part).values()}
        assert {(8, 5), (4, 8)} <= found <= {(8, 5), (4, 8), None}
        alone = [with_bits_of(part, group) for group in range(2)]

        def check(model, args, kwargs, result, alone=alone, groups=groups):
            group = groups.group(kwargs["timestep"] if "timestep" in kwargs else args[1])
            seen.append((groups, group))
            for other in range(2):
                expected = alone[other].forward(*args, **kwargs)
                assert torch.equal(expected[0], result[0]) == (other == group)

        part.register_forward_hook(check, with_kwargs=True)
    made = [unets.generate(pipe)] if kind is unets else [pipelines.generate(pipe, name)]
    assert len(set(seen)) == 2 * len(names)
    for part in (getattr(pipe, n) for n in names):
        part._forward_hooks.clear()
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    made.append(unets.generate(again) if kind is unets else pipelines.generate(again, name))
    torch.testing.assert_close(made[0], made[1], atol=1e-5, rtol=0)
    for n in names:
        first, second = getattr(pipe, n).state_dict(), getattr(again, n).state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
        assert step_groups_of(getattr(again, n)) == step_groups_of(getattr(pipe, n))


def test_samples_are_quantized_with_the_bits_of_their_steps():
    """The error of a block is the mean of what its samples have with the bits of their own groups."""
    plain = BlockSettings(TransformSettings(scale=False, rotation="none"), weight_clip=False, act_clip=False)

    def outcome(members):
        case = Case()
        plans = {
            name: plan
            if plan.act_bits is None
            else replace(plan, weight_bits=8, act_bits=8, act_groups=(3, 8))
            for name, plan in case.plans.items()
        }

        def run(call):
            choose_group(case.block.module, call.group)
            return run_block(case.block.module, call, case.block.outputs)

        own = [(replace(c, group=g), t) for c, t, g in zip(case.calls, case.targets, members, strict=True)]
        own = [(call, target) for call, target in own if call.group is not None]
        return quantize_block(
            case.block.module, plans, run, *map(list, zip(*own, strict=True)), plain, loss=lambda *_: None
        )

    mixed, low, high = (outcome(m) for m in ([0, 1, 0, 1], [0, None, 0, None], [None, 1, None, 1]))
    assert low.error_after > 10 * high.error_after
    for when in ("error_before", "error_after"):
        mean = (getattr(low, when) + getattr(high, when)) / 2
        assert getattr(mixed, when) == pytest.approx(mean, rel=1e-6)


LIST = "quantize.acts=[8,5]"
GROUPS = ("--set", "quantize.step_groups=2")


def test_what_cannot_be_done_is_one_line(cli, wan_folder, tmp_path):
    def refused(*options, recipe="rtn"):
        return cli("compress", wan_folder, "-o", tmp_path / "out", "--recipe", recipe, *options).message

    assert "quantize.acts = [8, 5]" in refused("--set", LIST) and "step_groups is 1, not 2" in refused(
        "--set", LIST
    )
    assert "step_groups is 2, not 3" in refused(*GROUPS, "--set", "quantize.acts=[8,6,4]")
    assert "in each group" in refused(*GROUPS, "--set", "quantize.acts=[16,4]")
    assert "quantize.step_groups = 0" in refused("--set", "quantize.step_groups=0")
    message = refused("--set", "quantize.roles={ffn.up: {acts: [8, 6]}}")
    assert "acts cannot be [8, 6] for one group of steps [ffn.up]" in message and "step_groups" in message
    message = refused(*GROUPS, "--set", "quantize.roles={ffn.up: {acts: [8, 9]}}")
    assert "acts cannot be 9 bits in a group of steps [ffn.up]" in message
    assert "3 steps cannot be cut into 4 groups" in refused(
        "--set", "quantize.step_groups=4", "--set", "quantize.acts=[8,7,6,5]"
    )
    assert "finetune trains all steps with the same bits" in refused(*GROUPS, recipe="efficientdm")
    assert "set reconstruct.batch_size to 1" in refused(
        *GROUPS, "--set", "reconstruct.batch_size=2", recipe="attar-ptq"
    )
    budget = ("--budget", "3bits", "--acts", "5", "--set", "allocate.acts=true")
    assert "less than one for each of 2 groups" in refused(*GROUPS, *budget, "--set", "allocate.samples=1")


def test_dry_run_and_benchmark_know_the_groups(cli, small_limit, wan_folder, tmp_path):
    options = ("--recipe", "hadamard", *GROUPS, "--set", LIST)
    done = cli("compress", wan_folder, *options, "--dry-run", "--json")
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in json.loads(done.out)["layers"]}
    assert rows["blocks.0.ffn.net.2"]["bits"] == "W4A8/5" and rows["blocks.0.ffn.net.2"]["acts"] == 8
    assert cli("compress", wan_folder, "-o", tmp_path / "small", *options).code == 0
    assert "W4A8/5" in (tmp_path / "small" / "README.md").read_text()
    for model in (wan_folder, tmp_path / "small"):
        done = cli("bench", model, "--tokens", "8", *(options if model == wan_folder else ()))
        assert done.code == 0, done.err


def test_recipes_without_groups_are_as_before():
    recipe = load_recipe("vidit-q")
    assert "step_groups" not in recipe.model_dump()["quantize"]
    grouped = load_recipe("vidit-q", {"quantize.step_groups": 2, "quantize.acts": [8, 6]})
    assert grouped.model_dump()["quantize"]["step_groups"] == 2 and grouped.bits == "W4A8/6"
    assert load_recipe(grouped.model_dump()) == grouped
    assert (
        load_recipe("rtn").traced is None
        and load_recipe("rtn", {"quantize.step_groups": 2}).traced.prompts == 1
    )


def test_what_a_recipe_without_data_traces_does_not_depend_on_where_its_trace_comes_from():
    """A file that leaves `trace` out has the default one, and one that says how many prompts is believed."""
    plain = {"name": "mine", "select": None, "reconstruct": None, "rounding": {"method": "nearest"}}
    plain["quantize"] = {"scale": False, "rotation": "none"}
    assert load_recipe(plain).traced is None
    assert load_recipe(plain, {"quantize.step_groups": 2}).traced.prompts == 1
    budget = {"allocate.budget": "3bits", "allocate.prompts": 3}
    assert load_recipe(plain, budget).traced.prompts == 3
    assert load_recipe(plain, budget | {"trace.prompts": 7}).traced.prompts == 7
    assert load_recipe(plain, budget | {"trace.steps": 4}).traced.prompts == 3


ACTS = ("--acts", "5", "--set", "allocate.acts=true", *GROUPS, "--set", "allocate.samples=3")


@pytest.fixture(scope="module")
def sensitive(tmp_path_factory):
    """A Wan whose inputs to `ffn.up` have, in the last three of six steps, one channel that hides all others."""
    pipe = pipelines.make("wan")
    pipe.scheduler.set_timesteps(6)
    embedder = pipe.transformer.condition_embedder
    with torch.no_grad():
        seen = embedder.act_fn(
            embedder.time_embedder(embedder.timesteps_proj(pipe.scheduler.timesteps.float()))
        )
        shift = torch.tensor(
            [0.0, 0.0, 0.0, 30.0, 30.0, 30.0]
        )  # of the norm before the feed-forward, by step
        row = 3 * pipe.transformer.blocks[0].norm2.normalized_shape[0] + 5
        embedder.time_proj.weight[row] = torch.linalg.lstsq(seen, shift[:, None]).solution[:, 0]
        embedder.time_proj.bias[row] = 0.0
    return pipelines.save(tmp_path_factory.mktemp("models") / "wan", steps=6, pipe=pipe)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["block", "latents"])
def test_a_budget_gives_bits_by_groups(commands, sensitive, objective, tmp_path):
    out = tmp_path / "plan.yaml"
    options = ("--recipe", "rtn", "--budget", "4bits", *ACTS, "--set", f"allocate.objective={objective}")
    assert commands.run("allocate", sensitive, "-o", out, *options) == 0
    found = json.loads((tmp_path / "plan.yaml.work" / "allocation.json").read_text())
    acts, errors = found["acts"]["transformer"], found["act_sensitivity"]["transformer"]
    lists = [bits for bits in acts.values() if isinstance(bits, list)]
    assert lists and all(len(bits) == 2 and bits[0] != bits[1] for bits in lists)
    for block in range(3):  # the step-sensitive layers get more where they are sensitive
        early, late = acts[f"blocks.{block}.ffn.net.0.proj"]
        assert late > early
    assert found["mean_act_bits"] <= 5
    chosen = {name: bits if isinstance(bits, list) else [bits] * 2 for name, bits in acts.items()}
    of_choice = sum(errors[n][str(b)][g] for n, bits in chosen.items() for g, b in enumerate(bits))
    assert of_choice < sum(sum(errors[name]["5"]) for name in chosen)
    assert 0.5 < found["measured_error"] / found["predicted_error"] < 2
    layers = yaml.safe_load(out.read_text())["layers"]["transformer"]
    assert {name: layer["acts"] for name, layer in layers.items() if "acts" in layer} == acts

    for more, processes in ((["--stream"], 1), ([], 2)):
        again = tmp_path / f"again-{processes}.yaml"
        command = commands.start("allocate", sensitive, "-o", again, *options, *more, processes=processes)
        assert command.wait_all() == [0] * processes, [log.read_text() for log in command.logs]
        assert yaml.safe_load(again.read_text())["layers"]["transformer"] == layers

    small, given = tmp_path / "small", tmp_path / "given"
    assert commands.run("compress", sensitive, "-o", small, *options) == 0
    plan = ("--recipe", "rtn", "--plan", out, *GROUPS)
    assert commands.run("compress", sensitive, "-o", given, *plan) == 0
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (small / file).read_bytes() == (given / file).read_bytes()
    assert (small / "transformer/config.json").read_bytes() == (
        given / "transformer/config.json"
    ).read_bytes()
    packed = packed_layers(attar.load(given).transformer)
    for name, bits in chosen.items():
        layer = packed[name]
        assert list(layer.act_groups or (layer.act_bits,) * 2) == bits


@pytest.mark.slow
def test_killed_and_resumed(commands, tmp_path):
    """Killed before every few files, the run ends with the bytes of an uninterrupted one."""
    folder = pipelines.save(tmp_path / "hunyuan", "hunyuan", steps=3)
    options = ("--recipe", "attar-ptq", "--budget", "3bits", *ACTS)
    options += tuple(part for key, value in FEW.items() if value for part in ("--set", f"{key}={value}"))
    whole, out = tmp_path / "whole" / "small", tmp_path / "small"
    assert commands.run("compress", folder, "-o", whole, *options) == 0
    command = ("compress", folder, "-o", out, *options)
    assert commands.run_killed(*command, out=out, writes=(4, 5, 7)) >= 2
    assert contents(out) == contents(whole)
    assert "step_groups" in (out / "transformer" / "config.json").read_text()
