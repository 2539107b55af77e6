"""`attar compress --dry-run`: the plan, and sizes that come true."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import pipelines, unets
from support.commands import contents
from support.fixtures import SMALL

from attar.evaluate.size import model_size
from attar.forecast.dry_run import forecast_job
from attar.models.adapter import ModelAdapter
from attar.models.source import Source
from attar.recipe import load_recipe

FEW = SMALL[2:]
TRACED = ["--set", "trace={prompts: 2, steps: 3}"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {
        name: pipelines.save(root / name, name, pipelines.CASES[name].steps) for name in ("wan22", "flux")
    }
    half = pipelines.make("wan")
    half.transformer.to(torch.bfloat16)
    half.transformer.scale_shift_table.data = half.transformer.scale_shift_table.data.float()
    made["wan"] = pipelines.save(root / "wan", pipe=half)
    return made


def test_every_linear_is_listed_with_its_bits_or_the_reason(cli, wan_folder):
    before = contents(wan_folder)
    done = cli("compress", wan_folder, "--dry-run", *SMALL)
    assert done.code == 0, done.err
    adapter = ModelAdapter.of(pipelines.make("wan").transformer)
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.startswith("transformer.")}
    inside = [linear for block in adapter.blocks for linear in adapter.linears(block)]
    outside = adapter.outside_linears()
    assert set(lines) == {f"transformer.{linear.name}" for linear in [*inside, *outside]}
    assert all("W4A6" in lines[f"transformer.{linear.name}"] for linear in inside)
    for linear in outside:
        assert "kept" in lines[f"transformer.{linear.name}"]
        assert lines[f"transformer.{linear.name}"].endswith("outside the transformer blocks")
    last = done.out.splitlines()[-3:]
    assert "block linears" in last[0] and "calibration about" in last[1] and "peak memory about" in last[1]
    assert contents(wan_folder) == before


@pytest.mark.parametrize(("recipe", "read"), [("rtn", False), ("smoothquant", True)])
def test_prompts_and_sizes_that_nothing_reads_are_noted(cli, folders, tmp_path, recipe, read):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    few = FEW[:4] if read else []
    for given in (["--prompts", prompts], ["--height", "16"], []):
        done = cli("compress", folders["wan"], "--dry-run", "--recipe", recipe, *few, *given)
        assert done.code == 0, done.err
        assert ("prompts and sizes change nothing" in " ".join(done.err.split())) == (
            bool(given) and not read
        )


@pytest.mark.slow(but=["wan-options0", "wan-options1", "wan22-options3"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wan", ["--recipe", "rtn"]),
        ("wan", ["--recipe", "hadamard", "--weights", "3"]),
        ("wan", [*SMALL, "--set", "quantize.roles={ffn.down: {weights: 8}, cross_attn.*: {acts: 16}}"]),
        ("wan22", ["--recipe", "smoothquant", *FEW[:4]]),
        ("wan22", [*SMALL, "--set", "quantize.rotation=orthogonal"]),
        ("flux", [*SMALL, "--set", "quantize.affine=true", "--set", "trace.steps=3"]),
        ("flux", [*SMALL, "--acts", "16", "--set", "quantize.group_size=16"]),
        ("wan", [*SMALL, "--acts", "4", "--set", "quantize.low_rank={rank: 2, acts: 4}"]),
        ("flux", [*SMALL, "--acts", "4", "--set", "quantize.low_rank={rank: 2, acts: 4}"]),  # in float32
    ],
)  # fmt: skip
def test_forecast_sizes_are_the_real_ones(cli, folders, tmp_path, name, options):
    forecast = cli("compress", folders[name], "--dry-run", "--json", *options)
    assert forecast.code == 0, forecast.err
    sizes = json.loads(forecast.out)["bytes"]
    done = cli("compress", folders[name], "-o", tmp_path / "out", "--json", *options)
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["linear_bytes_bf16"] == sizes["block_linears_bf16"]
    assert summary["linear_bytes_packed"] == sizes["block_linears_packed"]
    assert summary["linear_ratio"] == sizes["linear_ratio"]
    files = sum(size for part, size in model_size(tmp_path / "out").items() if part.startswith("transformer"))
    assert files == sizes["checkpoint"]


def test_the_rest_keeps_the_types_of_the_source(cli, folders, tmp_path):
    assert cli("compress", folders["wan"], "-o", tmp_path / "out", "--recipe", "rtn").code == 0
    name = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(folders["wan"] / name), load_file(tmp_path / "out" / name)
    same = [key for key in before if key in after]
    assert {after[key].dtype for key in same} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in same)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert contents(folders["wan"] / part) == contents(tmp_path / "out" / part)


def test_the_forecast_as_json(cli, folders):
    done = cli("compress", folders["wan22"], "--dry-run", "--json", *SMALL)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert {row["component"] for row in result["layers"]} == {"transformer", "transformer_2"}
    assert result["bits"] == "W4A6" and result["recipe"] == "s2q-vdit"
    assert result["seconds"] >= result["trace_seconds"] >= 0 and result["peak_bytes"] > 0
    assert "one denoising step" in result["measured_on"]
    result = json.loads(cli("compress", folders["wan22"], "--dry-run", "--json", "--recipe", "rtn").out)
    assert result["measured_on"] is None and result["seconds"] == 0


@pytest.mark.slow(but=["0.35x-options1"])
@pytest.mark.parametrize(
    ("budget", "options"),
    [("same", SMALL), ("0.35x", ["--recipe", "rtn", *FEW]), ("3bits", ["--recipe", "hadamard", *FEW])],
)
def test_a_budget_is_forecast(cli, folders, tmp_path, budget, options):
    options = [*options, "--budget", budget, "--set", "allocate.samples=2"]
    done = cli("compress", folders["wan"], "--dry-run", "--json", *options)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["budget"] == budget
    assert result["measured_on"] and result["seconds"] >= result["allocate_seconds"] > 0
    chosen_for = [row for row in result["layers"] if row["presumed"]]
    assert {row["role"] for row in chosen_for} >= {"self_attn.q", "ffn.up"}
    assert {row["reason"] for row in chosen_for} == {"bits by measured sensitivity"}
    if budget == "same":
        assert {row["weights"] for row in chosen_for} == {4}
    done = cli("compress", folders["wan"], "-o", tmp_path / "out", "--json", *options)
    assert done.code == 0, done.err
    summary, sizes = json.loads(done.out), result["bytes"]
    assert summary["linear_bytes_bf16"] == sizes["block_linears_bf16"]
    adapter = ModelAdapter.of(pipelines.make("wan").transformer)
    largest = max(x.module.weight.numel() for block in adapter.blocks for x in adapter.linears(block))
    # the real plan fills the budget as well as whole layers allow, and so does the presumed one
    assert abs(summary["linear_bytes_packed"] - sizes["block_linears_packed"]) <= largest * 3 / 8
    text = cli("compress", folders["wan"], "--dry-run", *options).out
    assert f"budget {budget}: the layers marked ~" in text and "choosing bits" in text


def test_layers_of_which_activations_alone_are_chosen_are_marked(cli, folders):
    acts = ["--set", "allocate={budget: same, acts: true, act_bits: [4, 6, 8], samples: 2, bits: [4]}"]
    options = [*SMALL, *acts]
    rows = json.loads(cli("compress", folders["wan"], "--dry-run", "--json", *options).out)["layers"]
    assert {row["acts"] is not None for row in rows if row["presumed"]} == {True}
    assert {row["role"] for row in rows if row["presumed"]} >= {"self_attn.q", "ffn.up"}
    options += ["--set", "quantize.roles={ffn.up: {acts: 8}}"]
    rows = json.loads(cli("compress", folders["wan"], "--dry-run", "--json", *options).out)["layers"]
    assert {(row["acts"], row["presumed"]) for row in rows if row["role"] == "ffn.up"} == {(8, False)}


@pytest.mark.slow
def test_every_kind_of_block_is_measured(cli, folders):
    def measured(name, *roles):
        options = ["--set", f"quantize.roles={{{', '.join(roles)}}}"] if roles else []
        done = cli("compress", folders[name], "--dry-run", "--json", *SMALL, *options)
        assert done.code == 0, done.err
        result = json.loads(done.out)
        return result["measured_on"], result["seconds"] - result["trace_seconds"]

    steps, _ = measured("flux")
    assert (
        "transformer.transformer_blocks.0 (" in steps and "transformer.single_transformer_blocks.0 (" in steps
    )
    steps, skipped = measured("wan", "blocks.0.*: {skip: true}")
    assert "transformer.blocks.1 (" in steps and "blocks.0" not in steps and "blocks.2" not in steps
    # the least of three times: a busy machine makes single ones larger
    whole = min(measured("wan")[1] for _ in range(3))
    assert skipped > 0.2 * whole  # two of three blocks are left
    steps, _ = measured("wan", "blocks.2.*: {acts: 16}")
    assert "transformer.blocks.0 (" in steps and "transformer.blocks.2 (" in steps
    assert "blocks.0 (" in measured("wan22")[0] and "transformer_2" not in measured("wan22")[0]


@pytest.mark.parametrize(
    ("recipe", "more"),
    [("qvgen", ["--set", "finetune.auxiliary_rank=2"]), ("efficientdm", []), ("mpq-dm", [])],
)
def test_training_a_whole_model_is_measured(cli, folders, recipe, more):
    def learning(steps):
        options = ["--recipe", recipe, *TRACED, "--set", f"finetune.steps={steps}", *more]
        done = cli("compress", folders["wan"], "--dry-run", "--json", *options)
        assert done.code == 0, done.err
        result = json.loads(done.out)
        assert "one training step of transformer.blocks.0" in result["measured_on"]
        return result["seconds"] - result["trace_seconds"], result["peak_bytes"]

    short, held = learning(10)
    long, same = learning(100_000)
    assert long > 100 * short > 0  # with nothing to learn in a block alone it was noise once, or 0
    assert held == same
    layers = json.loads(cli("compress", folders["wan"], "--dry-run", "--json", "--recipe", "rtn").out)
    assert held > layers["peak_bytes"]


ROWS_ALONE = {
    "quantize.roles": {"resnet.conv*": {"skip": True}},
    "finetune.weight_lr": 0,
    "finetune.clip_lr": 1e-3,
}


@pytest.mark.parametrize(
    ("make", "recipe", "overrides"),
    [
        (unets.make, "quest", {}),  # convolutions are opened, few layers chosen
        (unets.make, "quantized-distillation", ROWS_ALONE),  # blocks in which nothing is trained
        # polished without a learned block, with codes that stay
        (
            pipelines.make,
            "rtn",
            {"rounding.method": "gptq", "select.count": 2, "finetune": {"scale_lr": 1e-3}},
        ),
        (pipelines.make, "efficientdm", {"finetune.steps": 1}),
        (pipelines.make, "s2q-vdit", {"reconstruct.epochs": 2, "rounding.epochs": 2, "select.count": 2}),
    ],
)
def test_whatever_can_be_trained_is_tried(make, recipe, overrides):
    if make is unets.make:
        pipe, prompts, generation = make("sd"), unets.PROMPTS[:1], unets.GENERATION
    else:
        pipe, prompts, generation = make("wan"), pipelines.PROMPTS[:2], pipelines.CASES["wan"].generation
    model = pipe.unet if make is unets.make else pipe.transformer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = load_recipe(recipe, {"trace.prompts": len(prompts), "trace.steps": 2, **overrides})
    result = forecast_job(pipe, Source("it"), recipe, prompts, {**generation, "num_inference_steps": 2})
    assert result["seconds"] >= result["trace_seconds"] and result["peak_bytes"] > 0
    assert "training step" in result["measured_on"]
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())


def test_of_two_stages_the_larger_one_decides_the_memory():
    def peak(**stages):
        recipe = load_recipe("s2q-vdit", {"trace.prompts": 2, "trace.steps": 2, "select.count": 2, **stages})
        case = pipelines.CASES["wan"]
        return forecast_job(
            pipelines.make("wan"), Source("it"), recipe, pipelines.PROMPTS[:2], case.generation
        )["peak_bytes"]

    assert peak(**{"rounding.epochs": 2}) == peak()


def test_pipelines_that_treat_a_single_step_otherwise():
    """PixArt's takes one step for a distilled model's."""
    case = pipelines.CASES["pixart"]
    recipe = load_recipe("smoothquant", {"trace.prompts": 2})
    pipe = pipelines.make("pixart")
    result = forecast_job(pipe, Source("it"), recipe, pipelines.PROMPTS[:2], case.generation)
    assert "one denoising step" in result["measured_on"]


def test_the_dry_run_asks_what_the_run_would(cli, wan_folder):
    options = ("--dry-run", *SMALL, "--set", "select.count=7")
    assert "fewer candidates" in cli("compress", wan_folder, *options).message
    options = ("--dry-run", *SMALL, "--height", "15")
    assert "rejects its arguments" in cli("compress", wan_folder, *options).message
