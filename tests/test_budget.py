"""Compression under a budget, end to end: real bytes, the plan file, and resume."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import pipelines, unets
from support.commands import contents

import attar
from attar.errors import AttarError
from attar.runtime.layers import packed_layers
from attar.runtime.size import packed_size

FEW = ("--set", "allocate.samples=3", "--set", "allocate.objective=latents")
RTN = ("--recipe", "rtn")
HADAMARD = ("--recipe", "hadamard")
LEARNED = (
    "--recipe",
    "attar-ptq",
    "--set",
    "trace.prompts=2",
    "--set",
    "select.count=3",
    "--set",
    "reconstruct.epochs=1",
)


@pytest.fixture(scope="module")
def plan(commands, wan_folder, tmp_path_factory):
    """A plan of 3 bits on average for hadamard."""
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    assert commands.run("allocate", wan_folder, "--budget", "3bits", "-o", path, *HADAMARD, *FEW) == 0
    return path


def weights_of(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def linear_bytes(transformer):
    """(packed, bfloat16) bytes of the packed layers as they are in memory, biases at two bytes an element."""
    size, layers = packed_size(transformer), packed_layers(transformer).values()
    biases = sum(2 * layer.bias.numel() for layer in layers if layer.bias is not None)
    dense = sum(2 * layer.in_features * layer.out_features for layer in layers)
    return size["codes"] + size["scales"] + size["transforms"] + biases, dense + biases


@pytest.mark.slow(but=["rtn-0.25x-options0"])
@pytest.mark.parametrize(
    ("recipe", "budget", "options"),
    [
        ("rtn", "0.25x", {}),
        ("hadamard", "0.30x", {}),
        ("smoothquant", "0.36x", {"trace.prompts": 2, "select.count": 3}),
        ("rtn", "0.28x", {"quantize.roles": {"ffn.*": {"weights": 3}, "head": {"weights": 8}}}),
    ],
)
def test_a_size_is_kept_by_real_bytes(recipe, budget, options):
    case = pipelines.CASES["wan"]
    pipe = attar.compress(
        pipelines.make("wan"), recipe, budget=budget, overrides={"allocate.samples": 3, **options},
        generation={**case.generation, "num_inference_steps": 3},
    )  # fmt: skip
    found = pipe.attar_compression.allocation
    packed, dense = linear_bytes(pipe.transformer)
    assert packed == found.linear_bytes <= float(budget[:-1]) * dense
    assert found.ratio == pytest.approx(packed / dense, abs=1e-6)
    smallest = min(
        layer.in_features * layer.out_features for layer in packed_layers(pipe.transformer).values()
    )
    assert packed > float(budget[:-1]) * dense - 4 * smallest / 8  # as near as one layer's step of two widths
    for name, layer in packed_layers(pipe.transformer).items():
        assert layer.weight_bits == found.bits["transformer"].get(name, layer.weight_bits)
        assert (name not in found.bits["transformer"]) == (
            bool(options.get("quantize.roles")) and (".ffn." in name or name == "proj_out")
        )


def test_mean_bits_are_kept(commands, wan_folder, plan, tmp_path):
    out = tmp_path / "small"
    options = ("--budget", "3bits", *HADAMARD, *FEW, "--workspace", f"{plan}.work")
    assert commands.run("compress", wan_folder, "-o", out, *options) == 0  # goes on where allocate stopped
    assert (out / "plan.yaml").read_bytes() == plan.read_bytes()
    evidence = json.loads((out / "compression.json").read_text())
    assert evidence["recipe"]["allocate"]["budget"] == "3bits"
    found = evidence["allocation"]
    bits = {name: b for name, b in found["bits"]["transformer"].items()}
    assert len(bits) == 30 and set(bits.values()) <= {2, 3, 4, 5, 6, 8} and len(set(bits.values())) > 1
    assert found["mean_bits"] <= 3 and found["predicted_error"] < found["uniform_error"] * 10
    assert 0.5 < found["measured_error"] / found["predicted_error"] < 2
    state = weights_of(out)
    for name, b in bits.items():
        rows, row = state[f"{name}.codes"].shape
        assert row == -(-state_width(name) * b // 8) and rows
    card = (out / "README.md").read_text()
    assert "| budget | 3bits: " in card and "published recipe" not in card


def state_width(name):
    return 64 if name.endswith("net.2") else 32


def test_the_mixed_plan_is_better_than_the_uniform_one_of_its_size(wan_folder, plan):
    found = yaml.safe_load(plan.read_text())["chosen"]
    uniform = json.loads((plan.parent / "plan.yaml.work" / "allocation.json").read_text())["sensitivity"]
    three = sum(errors["3"] for errors in uniform["transformer"].values())
    assert found["mean_bits"] <= 3 and found["predicted_error"] < three


def test_a_plan_is_given_back_and_edited(commands, cli, wan_folder, plan, tmp_path):
    budget, given = tmp_path / "budget", tmp_path / "given"
    options = ("--budget", "3bits", *HADAMARD, *FEW, "--workspace", f"{plan}.work")
    assert commands.run("compress", wan_folder, "-o", budget, *options) == 0
    assert commands.run("compress", wan_folder, "-o", given, "--plan", plan, *HADAMARD) == 0
    first, second = weights_of(budget), weights_of(given)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert "30 overrides" in (given / "README.md").read_text()

    edited = tmp_path / "edited.yaml"
    lines = plan.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if "blocks.1.attn1.to_q:" in line)
    lines[place] = "    blocks.1.attn1.to_q: {weights: 8, acts: 16}"
    lines.insert(place + 1, "    proj_out: {weights: 8}")
    edited.write_text("\n".join(lines) + "\n")
    done = cli("compress", wan_folder, "--plan", edited, *HADAMARD, "--dry-run", "--json")
    rows = {row["name"]: row["bits"] for row in json.loads(done.out)["layers"]}
    bits = yaml.safe_load(plan.read_text())["layers"]["transformer"]
    assert rows["blocks.1.attn1.to_q"] == "W8A16" and rows["proj_out"] == "W8A16"
    assert rows["blocks.2.ffn.net.2"] == f"W{bits['blocks.2.ffn.net.2']['weights']}A6"
    message = cli("compress", wan_folder, "-o", given, "--overwrite", "--plan", edited, *HADAMARD).message
    assert "another job (different: recipe)" in message  # the plan is part of the job
    small = attar.compress(str(wan_folder), "hadamard", plan=edited)
    assert packed_layers(small.transformer)["blocks.1.attn1.to_q"].weight_bits == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("wan", (*LEARNED, "--budget", "1dB")),
        ("hunyuan", (*HADAMARD, "--budget", "3bits", "--set", "allocate.acts=true")),
    ],
)
def test_killed_and_resumed(commands, model, options, tmp_path):
    """Killed before every few files, the run ends with the bytes of an uninterrupted one."""
    folder = pipelines.save(tmp_path / model, model, steps=3)
    whole, out = tmp_path / "whole" / "small", tmp_path / "small"
    assert commands.run("compress", folder, "-o", whole, *options, *FEW) == 0
    command = ("compress", folder, "-o", out, *options, *FEW)
    assert commands.run_killed(*command, out=out, writes=(4, 5, 7)) >= 2
    assert contents(out) == contents(whole)


def test_a_plan_that_was_made_beside_branches_needs_them(commands, wan_folder, tmp_path):
    out, branch = tmp_path / "plan.yaml", "quantize.low_rank={rank: 2, iterations: 0, acts: 4}"
    options = (*RTN, "--set", branch)
    assert (
        commands.run("allocate", wan_folder, "-o", out, "--budget", "4bits", "--acts", "4", *options, *FEW)
        == 0
    )
    assert yaml.safe_load(out.read_text())["chosen"]["branch_rank"] == 2
    compress = ("compress", wan_folder, "-o", tmp_path / "small", "--dry-run", "--plan", out, *options)
    refused = commands.start(*compress)
    assert refused.wait() == 1 and "branches of rank 2, and the recipe has none" in refused.log.read_text()
    out.write_text(out.read_text().replace("  branch_rank: 2\n", ""))
    assert commands.run(*compress) == 0


def test_activations_get_as_many_bits_over_all_multiplications(commands, wan_folder, tmp_path):
    """More where they do more harm; layers whose activations the recipe names keep these."""
    out = tmp_path / "plan.yaml"
    acts = ("--acts", "4", "--set", "allocate.acts=true", "--set", "quantize.roles={ffn.up: {acts: 8}}")
    assert commands.run("allocate", wan_folder, "-o", out, "--budget", "4bits", *acts, *RTN, *FEW) == 0
    found = json.loads((tmp_path / "plan.yaml.work" / "allocation.json").read_text())
    plan = yaml.safe_load(out.read_text())
    layers = plan["layers"]["transformer"]
    bits = {name: options["acts"] for name, options in layers.items() if "acts" in options}
    assert bits == found["acts"]["transformer"] and len(set(bits.values())) > 1
    assert not any("ffn.net.0" in name for name in bits) and "acts" not in layers["blocks.0.ffn.net.0.proj"]
    counts = {}
    for index in range(3):
        text = (tmp_path / "plan.yaml.work" / "transformer" / f"activations-{index:03d}.json").read_text()
        counts |= {f"blocks.{index}.{k}": n for k, n in json.loads(text)["multiplications"].items()}
    # keys of cross-attention are made of the text's tokens, queries of the video's
    assert counts["blocks.0.attn2.to_q"] > counts["blocks.0.attn2.to_k"] == counts["blocks.1.attn2.to_v"]
    free = sum(counts[name] for name in bits)
    assert sum(counts[name] * b for name, b in bits.items()) <= 4 * free
    errors = found["act_sensitivity"]["transformer"]
    assert sum(errors[name][str(b)] for name, b in bits.items()) < sum(errors[name]["4"] for name in bits)
    assert plan["chosen"]["mean_act_bits"] > 4  # with the layers of eight
    small = attar.compress(str(wan_folder), "rtn", plan=out)
    for name, b in bits.items():
        assert packed_layers(small.transformer)[name].act_bits == b


@pytest.mark.slow
def test_blocks_can_count_alike(commands, wan_folder, tmp_path):
    plans = {}
    for objective in ("block", "latents"):
        out = tmp_path / f"{objective}.yaml"
        options = ("--budget", "3bits", *HADAMARD, *FEW, "--set", f"allocate.objective={objective}")
        assert commands.run("allocate", wan_folder, "-o", out, *options) == 0
        plans[objective] = json.loads((tmp_path / f"{objective}.yaml.work" / "allocation.json").read_text())
    alike, reaching = plans["block"], plans["latents"]
    times = reaching["influence"]["transformer"]
    assert alike["influence"] == {"transformer": {}} and len(times) == 3
    assert all(value > 0 for value in times.values()) and len(set(times.values())) == 3
    for name, errors in reaching["sensitivity"]["transformer"].items():
        block, path = name.split(".")[1], name.split(".", 2)[2]
        stored = (
            tmp_path / "latents.yaml.work" / "transformer" / f"weights-{int(block):03d}.json"
        ).read_text()
        own = json.loads(stored)[path]
        assert errors == pytest.approx({b: e * times[f"blocks.{block}"] for b, e in own.items()})


def groups_of(found, kind, layer_cost):
    """Metric -> what its layers cost with the bits of an allocation, by layer_cost(component, layer)."""
    costs = {}
    for component, named in found[kind].items():
        for name, b in named.items():
            metric = found["metrics"][component][name]
            costs[metric] = costs.get(metric, 0) + layer_cost(component, name) * b
    return costs


@pytest.mark.slow
def test_each_group_of_layers_is_chosen_by_its_own_metric(commands, wan_folder, tmp_path):
    """ViDiT-Q: as many bits in every group as by the squared error, and in each the choice that its metric wants."""
    plans, acts = {}, ("--acts", "4", "--set", "allocate.acts=true")
    for objective in ("latents", "metrics"):
        out = tmp_path / f"{objective}.yaml"
        options = ("--budget", "3bits", *acts, *HADAMARD, *FEW, "--set", f"allocate.objective={objective}")
        assert commands.run("allocate", wan_folder, "-o", out, *options) == 0
        plans[objective] = json.loads((tmp_path / f"{objective}.yaml.work" / "allocation.json").read_text())
    plain, found = plans["latents"], plans["metrics"]
    assert plain["metrics"] == {} and found["objective"] == "metrics"
    metrics = found["metrics"]["transformer"]
    assert metrics["blocks.1.attn2.to_k"] == "content" and metrics["blocks.1.attn1.to_k"] == "motion"
    assert metrics["blocks.1.ffn.net.2"] == "quality"
    # what all layers cost is shared out by the same errors
    assert found["sensitivity"] == plain["sensitivity"]
    assert found["act_sensitivity"] == plain["act_sensitivity"]
    plain["metrics"] = found["metrics"]
    weights = {
        n: m.weight.numel() for n, m in pipelines.make("wan").transformer.named_modules() if n in metrics
    }
    work = tmp_path / "metrics.yaml.work" / "transformer"
    counts = {
        f"blocks.{k}.{path}": n
        for k in range(3)
        for path, n in json.loads((work / f"activations-{k:03d}.json").read_text())["multiplications"].items()
    }
    for kind, each in (("bits", weights), ("acts", counts)):
        asked, got = (groups_of(p, kind, lambda c, name, each=each: each[name]) for p in (plain, found))
        assert got.keys() == {"content", "motion", "quality"}
        assert all(got[metric] <= asked[metric] for metric in got)
    assert (found["bits"], found["acts"]) != (plain["bits"], plain["acts"])
    assert "(motion)" in (tmp_path / "metrics.yaml").read_text()
    seen = json.loads((work / "metrics-of-weights-000.json").read_text())
    assert seen.keys() == {"content", "motion", "quality"} and all(e["seen"] > 0 for e in seen.values())


@pytest.mark.slow(but=["dit"])
@pytest.mark.parametrize("case", ["cogvideox", "ltx", "dit"])
def test_metrics_of_every_kind_of_latents(case):
    known = pipelines.CASES[case].generation
    small = attar.compress(
        pipelines.make(case), "rtn", budget="3bits", generation={**known, "num_inference_steps": 2},
        overrides={"allocate.samples": 2, "allocate.objective": "metrics"}, prompts=pipelines.PROMPTS[:1],
    )  # fmt: skip
    found = small.attar_compression.allocation
    assert found.mean_bits <= 3 and found.predicted_error > 0
    metrics = set(found.metrics["transformer"].values())
    assert ("motion" in metrics) == (case in ("cogvideox", "ltx")) and "quality" in metrics


def test_metrics_do_not_keep_to_a_loss(cli, wan_folder, tmp_path):
    asked = ("--budget", "0.5dB", "--set", "allocate.objective=metrics")
    message = cli("compress", wan_folder, "-o", tmp_path / "out", *RTN, *asked).message
    assert "0.5dB is one of the latents' squared error" in message and "objective to latents" in message


@pytest.mark.slow
def test_two_experts_share_a_budget(commands, tmp_path):
    folder = pipelines.save(tmp_path / "wan22", "wan22", steps=6)
    out = tmp_path / "small"
    assert commands.run("compress", folder, "-o", out, *RTN, "--budget", "2.9bits", *FEW) == 0
    found = json.loads((out / "compression.json").read_text())["allocation"]
    assert found["mean_bits"] <= 2.9
    layers = yaml.safe_load((out / "plan.yaml").read_text())["layers"]
    assert layers.keys() == {"transformer", "transformer_2"} == found["blocks"].keys()
    assert layers["transformer"] != layers["transformer_2"]
    given = tmp_path / "given"
    assert commands.run("compress", folder, "-o", given, *RTN, "--plan", out / "plan.yaml") == 0
    for name in ("transformer", "transformer_2"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (out / file).read_bytes() == (given / file).read_bytes()


@pytest.mark.slow
def test_streamed_and_in_two_processes(commands, wan_folder, plan, tmp_path):
    streamed = tmp_path / "streamed.yaml"
    options = ("--budget", "3bits", *HADAMARD, *FEW)
    assert commands.run("allocate", wan_folder, "-o", streamed, *options, "--stream") == 0
    assert streamed.read_bytes() == plan.read_bytes()
    shared = tmp_path / "shared.yaml"
    command = commands.start("allocate", wan_folder, "-o", shared, *options, processes=2)
    assert command.wait_all() == [0, 0], [log.read_text() for log in command.logs]
    one, two = (yaml.safe_load(path.read_text())["layers"] for path in (plan, shared))
    assert one == two


def test_what_cannot_be_done_is_one_line(cli, wan_folder, plan, tmp_path):
    def refused(*options):
        return cli("compress", wan_folder, "-o", tmp_path / "out", *RTN, *options).message

    assert "'3' is no budget" in refused("--budget", "3") and "3.2bits" in refused("--budget", "3")
    assert "cannot be '0x'" in refused("--budget", "0x")
    assert "allocate.bits" in refused("--budget", "3bits", "--set", "allocate.bits=[3,9]")
    assert "allocate.budget: Field required" in refused("--set", "allocate.samples=3")
    assert "a plan and a budget are given" in refused("--plan", plan, "--budget", "3bits")
    assert "no such plan file" in refused("--plan", tmp_path / "nothing.yaml")
    message = refused("--budget", "0.05x", *FEW)
    assert "no plan keeps to the budget 0.05x" in message and "The narrowest candidates come to 0." in message
    assert (
        "reach"
        in cli("allocate", wan_folder, "--budget", "-90dB", "-o", tmp_path / "p.yaml", *RTN, *FEW).message
    )
    text = plan.read_text()
    for change, says in {
        ("blocks.0.attn1.to_q:", "blocks.9.attn1.to_q:"): "matches no layer [blocks.9.attn1.to_q]",
        ("to_q: {weights: 3}", "to_q: {weights: 9}"): "weights cannot be 9 bits",
        ("to_q: {weights: 3}", "to_q: {bits: 3}"): "an override knows weights, acts and skip",
        ("WanTransformer3DModel ", "WanTransformer3DModel 0"): "made for another model",
    }.items():
        assert change[0] in text
        (tmp_path / "edited.yaml").write_text(text.replace(*change))
        assert says in refused("--plan", tmp_path / "edited.yaml")


def test_a_plan_takes_the_place_of_the_recipes_own_budget(cli, wan_folder, plan, tmp_path):
    """And nothing is measured then: the recipe attar has a budget, which an asked one would not be."""
    options = (
        "--recipe",
        "attar",
        "--set",
        "trace.prompts=2",
        "--set",
        "select.count=2",
        "--set",
        "reconstruct.epochs=0",
    )
    done = cli("compress", wan_folder, "-o", tmp_path / "out", *options, "--plan", plan, "--json")
    assert done.code == 0 and json.loads(done.out)["allocation"] is None
    layers = packed_layers(attar.load(tmp_path / "out").transformer)
    chosen = yaml.safe_load(plan.read_text())["layers"]["transformer"]
    assert {name: layers[name].weight_bits for name in chosen} == {n: o["weights"] for n, o in chosen.items()}
    for asked in (("--set", "allocate.budget=3bits"), ("--set", "allocate={budget: 3bits}")):
        message = cli("compress", wan_folder, "-o", tmp_path / "x", *options, "--plan", plan, *asked).message
        assert "a plan and a budget are given" in message


def test_a_plan_in_python_of_another_model(plan):
    with pytest.raises(AttarError, match="made for another model"):
        attar.compress(pipelines.make("flux"), "rtn", plan=plan)


@pytest.mark.slow
def test_a_unets_units_are_the_same_ones_when_all_are_known(commands, tmp_path):
    """They are numbered in the order of their calls, which a run that measures nothing any more has to know too."""
    folder, out = unets.save(tmp_path / "sd"), tmp_path / "plan.yaml"
    options = ("--budget", "3bits", *RTN, *FEW)
    assert commands.run("allocate", folder, "-o", out, *options) == 0
    first, found = out.read_bytes(), json.loads((tmp_path / "plan.yaml.work" / "allocation.json").read_text())
    assert all(found["sensitivity"]["unet"][name] for name in found["bits"]["unet"])
    (tmp_path / "plan.yaml.work" / "allocation.json").unlink()
    assert commands.run("allocate", folder, "-o", out, *options) == 0
    assert out.read_bytes() == first


@pytest.mark.slow
def test_activations_get_listed_widths_alone(commands, wan_folder, tmp_path):
    """The recipe's own width is measured as well, and not given."""
    out = tmp_path / "plan.yaml"
    acts = ("--acts", "6", "--set", "allocate.acts=true", "--set", "allocate.act_bits=[4, 8]")
    assert commands.run("allocate", wan_folder, "-o", out, "--budget", "4bits", *acts, *RTN, *FEW) == 0
    layers = yaml.safe_load(out.read_text())["layers"]["transformer"]
    assert {layer["acts"] for layer in layers.values()} == {4, 8}
