"""`attar plan`: what it says, in which words, and what it refuses."""

import json
import shutil
from dataclasses import replace
from functools import cache

import pytest
from support import pipelines
from support.shapes import architecture

from attar.forecast.calibration import BlockCost, finetune_memory
from attar.forecast.hardware import find_hardware
from attar.forecast.plan import plan_model, size_for
from attar.recipe import load_recipe

PEAKS = [
    part
    for peak in ("fp32=0.05", "bf16=0.1", "int8=0.2", "attention=0.02", "bandwidth=0.01")
    for part in ("--peak", peak)
]


@cache
def planned(name, gpu="h200", recipe="attar-ptq", size=(None, None), **bits):
    keys = {"weights": "quantize.weights", "acts": "quantize.acts", "count": "select.count"}
    overrides = {keys.get(k, k): v for k, v in bits.items()}
    known = architecture(name)
    return plan_model(known, load_recipe(recipe, overrides), find_hardware(gpu), size_for(known, *size, None))


# bytes of the transformer in bfloat16 and the ratio with all linears of the blocks at 4 bits, without scales;
# of HunyuanVideo the text refiner, which is in no block, stays in bfloat16
@pytest.mark.parametrize(
    ("name", "size", "ratio"),
    [
        ("wan-1.3b", 2.84e9, 3.78), ("wan-14b", 28.6e9, 3.81), ("wan2.2-5b", 10.0e9, 3.79), ("hunyuan", 25.6e9, 3.69),
        ("cogvideox-2b", 3.4e9, 3.91), ("cogvideox-5b", 11.1e9, 3.95), ("ltx-2b", 3.8e9, 3.74), ("flux", 23.8e9, 3.93),
    ],
)  # fmt: skip
def test_sizes_of_real_models(name, size, ratio):
    from attar.forecast.sizes import planned_sizes
    from attar.planning import plan_component

    transformers = architecture(name).transformers
    recipe = load_recipe("rtn")
    plans = {n: plan_component(t, recipe) for n, t in transformers.items()}
    sizes = planned_sizes(transformers, plans, recipe)
    assert sizes["block_linears_bf16"] + sizes["rest_bf16"] == pytest.approx(size, rel=0.02)
    assert sizes["transformer_ratio"] == pytest.approx(ratio, rel=0.01)
    assert sizes["checkpoint"] == pytest.approx(size / ratio, rel=0.025)


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox-2b", "ltx-2b", "flux"])
def test_every_family_at_its_own_size(name):
    result = planned(name, recipe="rtn")
    assert json.loads(json.dumps(result)) == result
    shares = result["step"]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert result["speedup"]["bound"] <= result["speedup"]["linears_free"]
    assert 1 < result["speedup"]["perfect_kernels"] <= result["speedup"]["bound"] * 1.001
    heavy = any("attention is" in s for s in result["verdict"])
    assert heavy == (shares["attention"] > 0.5)
    assert result["around"]["vae"]["flops"] > 0 and result["around"]["text_encoder"]["flops"] > 0


@pytest.mark.parametrize("number", ["int", "full_range"])
def test_wan_at_480p_as_everyone_asks(cli, number):
    done = cli(
        "plan", "wan-1.3b", "--resolution", "832x480", "--frames", "81", "--gpu", "h200", "--acts", "6",
        "--set", f"quantize.weight_format={number}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err == ""
    for text in (
        "attar W4A6 on NVIDIA H200", "self_attn.q", "cross", "vae, once", "text_encoder, once", "one video",
        "attention is 71% of the arithmetic", "6 bits run in int8 containers", "1.17×", "calibration about",
        "backend there is triton",
    ):  # fmt: skip
        assert text in done.out, text
    assert max(map(len, done.out.splitlines()[2:20])) < 100


def test_the_backend_is_that_of_the_hardware(monkeypatch):
    """The machine that plans may have other kernels than the one that is planned for."""
    from attar.forecast import verdict
    from attar.runtime.backend import BACKENDS

    def last(hardware):
        return verdict._backend({"hardware": {"name": hardware}})

    monkeypatch.setattr(verdict, "BACKENDS", {})
    assert "reference would run there" in last("h200")
    assert "backend today is" in last("cpu")
    gpu = replace(BACKENDS["cpu"], name="fast", device="cuda")
    monkeypatch.setattr(verdict, "BACKENDS", {"fast": gpu})
    assert last("h200").endswith("attar's backend there is fast.")


@pytest.mark.slow
def test_sentences():
    def says(*args, **bits):
        return " ".join(planned(*args, **bits)["verdict"])

    whole = " ".join(planned("wan-1.3b", recipe="qvgen")["verdict"])
    assert "with --set finetune.gradient_checkpointing=true" in whole
    assert "has no int4 arithmetic" in says("digits-video", weights=4, acts=4)
    assert "4-bit floats" in says("digits-video", "b200", weights=4, acts=4)
    assert "int4, attar's kernels do not: W4A4 runs in int8" in says(
        "digits-video", "a100", weights=4, acts=4
    )
    assert "over W8A8" in says("digits-video", acts=8)
    assert says("digits-video", acts=16).startswith("Weight-only formats")
    assert planned("digits-video", acts=16)["speedup"]["bound"] == 1
    text = says("hunyuan")
    assert text.startswith("Quantized linears alone cannot help much: attention is 87%") and "1.07×" in text
    assert "6 bits run in int8" in text and "compress --stream" not in text
    assert "compress --stream" in says("wan-1.3b", "4090") and "does not fit" in says("wan-14b", "4090")
    assert "does not fit" not in says("digits-video")


def test_calibration_grows_with_what_is_asked():
    small = planned("ltx-2b", count=10)["calibration"]
    large = planned("ltx-2b", count=20)["calibration"]
    assert large["learn_seconds"] > small["learn_seconds"] > 0 and small["trace_seconds"] > 0
    assert large["host"] == 2 * small["host"] and large["device"] == small["device"]
    free = planned("ltx-2b", recipe="hadamard")["calibration"]
    assert free["learn_seconds"] == free["trace_seconds"] == free["host"] == 0
    weights = 2 * (1.92 + 4.76 + 0.42) * 1e9
    assert weights < free["device"] < 1.05 * weights


@pytest.mark.slow
def test_blocks_are_learned_in_the_precision_of_the_model():
    usual, exact = (planned("wan-1.3b", **p)["calibration"] for p in ({}, {"precision": "float32"}))
    assert (usual["precision"], exact["precision"]) == ("bfloat16", "float32")
    assert exact["learn_seconds"] > 3 * usual["learn_seconds"]
    assert exact["device"] > usual["device"] > usual["streamed"] > 0
    assert planned("wan-1.3b", recipe="efficientdm")["calibration"]["streamed"] is None


def test_what_is_computed_anew_is_there_once():
    recipe = load_recipe("efficientdm", {"finetune.batch_size": 3})
    transformers = architecture("digits-video").transformers.values()

    def device(*blocks):
        return finetune_memory(0.0, transformers, recipe, blocks).device

    small, large = BlockCost(0.0, 0.0, 0.0, 10.0, 100.0), BlockCost(0.0, 0.0, 0.0, 20.0, 500.0)
    assert device(small, large, small) - device() == 3 * 40 + 500
    recipe = load_recipe("efficientdm", {"finetune.batch_size": 3, "finetune.gradient_checkpointing": True})
    inputs = [replace(block, input=2.0) for block in (small, large, small)]
    assert device(*inputs) - device() == 3 * (20 + 3 * 2) + 500


def test_a_budget_is_presumed(cli):
    def plan(*options):
        done = cli("plan", "digits-video", "--gpu", "h200", "--json", *options)
        assert done.code == 0, done.err
        return json.loads(done.out)

    plain, mixed = plan("--recipe", "attar-ptq"), plan("--recipe", "attar-mixed")
    assert (plain["budget"], mixed["budget"]) == (None, "same")
    assert mixed["bytes"] == plain["bytes"] and mixed["speedup"] == plain["speedup"]
    assert plain["calibration"]["allocate_seconds"] == 0 < mixed["calibration"]["allocate_seconds"]
    followed = plan("--recipe", "attar-mixed", "--set", "allocate.objective=latents")
    both = plan("--recipe", "attar-mixed", "--set", "allocate.acts=true")
    for more in (followed, both):
        assert more["calibration"]["allocate_seconds"] > mixed["calibration"]["allocate_seconds"]
    small = plan("--recipe", "rtn", "--set", "allocate.budget=0.22x")
    ratio = small["bytes"]["block_linears_packed"] / small["bytes"]["block_linears_bf16"]
    assert 0.219 < ratio <= 0.22
    assert small["calibration"]["trace_seconds"] > 0 == small["calibration"]["learn_seconds"]
    text = cli("plan", "digits-video", "--gpu", "h200", "--recipe", "attar-mixed").out
    assert "presumed here to keep to the budget same" in text and "choosing bits" in text


def test_guidance_and_steps(cli):
    arguments = ("plan", "digits-video", "--gpu", "cpu", *PEAKS, "--json")
    two = json.loads(cli(*arguments).out)
    one = json.loads(cli(*arguments, "--no-guidance", "--steps", "7", "--text-tokens", "16").out)
    assert (two["branches"], one["branches"]) == (2, 1) and (two["steps"], one["steps"]) == (50, 7)
    assert two["step"]["flops"] > 2 * one["step"]["flops"] * 0.999
    assert two["hardware"]["rates"]["bf16"] == 1e11
    assert (two["size"]["width"], two["size"]["frames"], two["size"]["text_tokens"]) == (32, 17, 32)


def test_a_folder(cli, wan_folder, tmp_path):
    folder = tmp_path / "configs"
    shutil.copytree(wan_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    size = ("--resolution", "32x16", "--frames", "9")
    done = cli("plan", folder, "--gpu", "4090", *size, "--recipe", "rtn", "--json")
    assert done.code == 0, done.err
    planned = json.loads(done.out)["bytes"]
    dry = json.loads(cli("compress", wan_folder, "--dry-run", "--recipe", "rtn", "--json").out)["bytes"]
    same = ("block_linears_bf16", "block_linears_packed", "rest_bf16", "linear_ratio", "transformer_ratio")
    assert {k: planned[k] for k in same} == {k: dry[k] for k in same}


@pytest.mark.parametrize("name", ["wan22", "cogvideox", "hunyuan", "ltx", "flux", "pixart", "dit"])
def test_folders_of_every_family(cli, tmp_path, name):
    case = pipelines.CASES[name]
    folder = pipelines.save(tmp_path / name, name, case.steps)
    done = cli("plan", folder, "--gpu", "h200", "--recipe", "rtn", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["steps"] == case.steps and result["bytes"]["linear_ratio"] > 1
    assert result["branches"] == (1 if name in ("flux", "hunyuan") else 2)
    assert ("transformer_2" in result["parameters"]) == (name == "wan22")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("wan-1.3b", "--gpu", "h300"), "unknown hardware 'h300' [--gpu]. Use one of cpu, a100"),
        (("wan-9b", "--gpu", "h200"), "no such model [wan-9b]"),
        (("Wan-AI/Wan", "--gpu", "h200"), "hf download Wan-AI/Wan --include '*.json'"),
        (("wan-1.3b", "--gpu", "h200", "--resolution", "830x480"), "830 is not divisible by 16"),
        (("wan-1.3b", "--gpu", "h200", "--resolution", "wide"), "no resolution [--resolution]"),
        (("wan-1.3b", "--gpu", "h200", "--resolution", "832x0"), "no resolution [--resolution]"),
        (("wan-1.3b", "--gpu", "h200", "--frames", "80"), "takes 4k + 1 [--frames]. Try 77 or 81"),
        (("ltx-2b", "--gpu", "h200", "--frames", "85"), "takes 8k + 1"),
        (("flux", "--gpu", "h200", "--frames", "5"), "one frame"),
        (("wan-1.3b", "--gpu", "h200", "--peak", "int9=3"), "is no peak rate"),
        (("wan-1.3b", "--gpu", "h200", "--recipe", "s3q"), "unknown recipe"),
        (("wan-1.3b", "--gpu", "h200", "--weights", "9"), "choose between 2 and 8"),
        (("wan-1.3b", "--gpu", "h200", "--set", "quantize.roles={x: {weights: 8}}"), "matches no layer"),
    ],
    ids=lambda value: " ".join(value[:5]) if isinstance(value, tuple) else "",
)
def test_what_is_refused(cli, arguments, says):
    assert says in cli("plan", *arguments).message


def test_folders_that_are_refused(cli, wan_folder, tmp_path):
    def plan(folder):
        return cli("plan", folder, "--gpu", "h200", "--resolution", "32x16", "--frames", "9").message

    folder = tmp_path / "model"
    shutil.copytree(wan_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = folder / "transformer" / "config.json"
    known = config.read_text()
    config.write_text("{")
    assert "not valid JSON [transformer/config.json]" in plan(folder)
    config.write_text(known.replace('"num_layers": 3', '"num_layers": "three"'))
    assert "does not fit" in plan(folder)
    config.unlink()
    assert "config is missing [transformer/config.json]" in plan(folder)
    config.write_text(json.dumps({**json.loads(known), "quantization_config": {"quant_method": "attar"}}))
    assert "already compressed" in plan(folder)
    (folder / "model_index.json").unlink()
    assert "model_index.json is missing" in plan(folder)


def test_a_folder_that_says_no_size(cli, wan_folder, tmp_path):
    folder = shutil.copytree(wan_folder, tmp_path / "model")
    (folder / "generation.json").unlink()
    assert "does not say its resolution" in cli("plan", folder, "--gpu", "h200").message
    line = cli("plan", folder, "--gpu", "h200", "--resolution", "32x16").message
    assert "does not say its number of frames" in line
