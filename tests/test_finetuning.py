"""Recipes that train the whole model, from the pipeline to the checkpoint."""

import gc
import json
import weakref

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from support import pipelines, unets
from support.commands import contents

import attar
from attar import finetuning
from attar.calibration.store import TraceStore
from attar.calibration.trace import trace_pipeline
from attar.errors import AttarError
from attar.progress import SilentProgress
from attar.quantize.finetune import Finetuner
from attar.recipe import load_recipe
from attar.runtime.backend import use_backend
from attar.runtime.layers import packed_layers
from attar.runtime.patches import PatchLinear
from attar.traced import OUTPUT, TracedSteps
from attar.workspace import Workspace

FEW = {"trace.prompts": 2, "finetune.steps": 6, "finetune.batch_size": 2}
QVGEN = {**FEW, "finetune.auxiliary_rank": 2}
EFFICIENT = {**FEW, "finetune.adapter_rank": 2}
LEVELS = {**FEW, "quantize.weight_format": "lloyd", "finetune.level_lr": 1e-3, "finetune.weight_lr": 0}
POLISH = {
    "trace.prompts": 2, "select.count": 3, "reconstruct.epochs": 1, "finetune.steps": 6, "finetune.batch_size": 2,
    "finetune.scale_lr": 3e-3, "finetune.bias_lr": 1e-3, "finetune.clip_lr": 1e-3,
}  # fmt: skip
CASES = [
    ("wan", "qvgen", QVGEN),
    ("flux", "efficientdm", EFFICIENT),
    ("hunyuan", "quantized-distillation", FEW),
    ("wan", "quantized-distillation", LEVELS),
    ("hunyuan", "attar-ptq", POLISH),
    ("wan22", "s2q-vdit", POLISH),
    ("dit", "qvgen", QVGEN),
]
OPTIONS = [word for key, value in QVGEN.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.slow(but=["qvgen-overrides0"])
@pytest.mark.parametrize(("recipe", "overrides"), [("qvgen", QVGEN), ("attar-ptq", POLISH)])
def test_training_in_bfloat16(recipe, overrides):
    exact, near = (
        compressed("wan", recipe, {**overrides, **more}).attar_compression.components["transformer"][
            "finetune"
        ]
        for more in ({}, {"precision": "bfloat16"})
    )
    assert near["history"] != exact["history"]
    for step in ("error_before", "error_after"):
        # bfloat16 itself makes about 1e-4 of the whole model's output
        assert near[step] == pytest.approx(exact[step], rel=0.2, abs=1e-4)


def compressed(name, recipe, overrides, **options):
    case = pipelines.CASES[name]
    settings = dict(
        prompts=["0", "1"] if name == "dit" else pipelines.PROMPTS[:2],
        generation={**case.generation, "num_inference_steps": case.steps},
    )
    return attar.compress(pipelines.make(name), recipe, overrides=overrides, **{**settings, **options})


@pytest.mark.slow(but=["wan-qvgen-overrides0", "dit-qvgen-overrides6", "flux-efficientdm-overrides1"])
@pytest.mark.parametrize(("name", "recipe", "overrides"), CASES)
def test_trained_models_are_packed_and_come_back_as_they_are(name, recipe, overrides, tmp_path):
    pipe = compressed(name, recipe, overrides)
    report = pipe.attar_compression.components["transformer"]
    learned = report["finetune"]
    assert learned["steps"] == 6 and learned["history"][-1][0] == 6
    assert 0 < learned["samples"] <= 2 * pipelines.CASES[name].steps
    assert 0 < learned["error_after"] < 1 and learned["error_before"] > 0
    assert [block["block"] for block in report["blocks"]]
    json.dumps(pipe.attar_compression.to_json(), allow_nan=False)
    assert packed_layers(pipe.transformer)
    assert all(layer.low_rank == 0 for layer in packed_layers(pipe.transformer).values())
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    pipelines.assert_same_model(pipe, again, name)


def test_trained_biases_are_in_the_files_of_the_command(commands, wan_folder, tmp_path):
    options = [word for key, value in POLISH.items() for word in ("--set", f"{key}={value}")]
    assert (
        commands.run("compress", wan_folder, "-o", tmp_path / "small", "--recipe", "attar-ptq", *options) == 0
    )
    small, source = (DiffusionPipeline.from_pretrained(f) for f in (tmp_path / "small", wan_folder))
    layers = packed_layers(small.transformer)
    moved = [not torch.equal(b.bias, source.transformer.get_submodule(n).bias) for n, b in layers.items()]
    assert moved and sum(moved) > len(moved) / 2


def test_a_split_u_net_of_half_precision(tmp_path):
    """Units and convolutions are trained as blocks and linears are, and all types come back."""
    pipe = unets.make("sd").to(torch.bfloat16)
    kept = {pattern: {"skip": True} for pattern in ("down_blocks.*", "resnet.conv2")}
    overrides = QVGEN | {"quantize.split": True, "quantize.roles": kept}
    small = attar.compress(
        pipe, "qvgen", overrides=overrides, prompts=unets.PROMPTS[:2],
        generation={**unets.GENERATION, "num_inference_steps": 3},
    )  # fmt: skip
    learned = small.attar_compression.components["unet"]["finetune"]
    assert learned["samples"] == 6 and 0 < learned["error_after"] < 1
    layers = packed_layers(small.unet)
    assert any(name.endswith("conv1.linear") for name in layers) and any(".parts." in name for name in layers)
    assert {layer.compute_dtype for layer in layers.values()} == {torch.bfloat16}
    assert {p.dtype for p in small.unet.parameters()} == {torch.bfloat16}
    small.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(unets.generate(again), unets.generate(small))


@pytest.mark.parametrize("name", ["wan", "cogvideox", "sd"])
def test_outputs_of_the_original_are_the_same_in_batches(name, tmp_path):
    """A U-Net has one time for a whole call, and a batch one for each row."""
    unet = name == "sd"
    pipe = unets.make(name) if unet else pipelines.make(name)
    component, generation = (
        ("unet", unets.GENERATION) if unet else ("transformer", pipelines.CASES[name].generation)
    )
    store = TraceStore(tmp_path / "trace")
    trace_pipeline(pipe, pipelines.PROMPTS[:2], store, steps=5, generation=generation)
    model = getattr(pipe, component)
    model.float()

    def run(call):
        return {OUTPUT: model(**call.streams, **call.constants)[0]}

    found = []
    for size in (1, 3):
        samples = TracedSteps(component, model, store, 2, Workspace(tmp_path / str(size)))
        samples.compute(run, size, SilentProgress())
        found.append([samples[i][1][OUTPUT] for i in range(len(samples))])
    assert len(found[0]) == 10 and found[0][0].shape == found[1][0].shape
    assert len({float(output.sum()) for output in found[0]}) == 10
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("recipe", "overrides"), [("qvgen", QVGEN), ("svdquant", POLISH)])
def test_branches_beside_the_layers_have_the_models_type(recipe, overrides):
    pipe = pipelines.make("wan").to(torch.bfloat16)
    branch = {"quantize.low_rank": {"rank": 2}, "quantize.roles": {"blocks.0.*": {"skip": True}}}
    options = dict(prompts=pipelines.PROMPTS[:2], generation={**pipelines.CASES["wan"].generation})
    options["generation"]["num_inference_steps"] = 2
    small = attar.compress(pipe, recipe, overrides=overrides | branch, **options)
    layers = packed_layers(small.transformer).values()
    assert any(layer.low_rank == 2 for layer in layers)
    assert {p.dtype for p in small.transformer.parameters()} == {torch.bfloat16}
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}


@pytest.mark.slow(but=["efficientdm-overrides0"])
@pytest.mark.parametrize(
    ("recipe", "overrides"), [("efficientdm", EFFICIENT), ("attar-ptq", POLISH), ("quest", FEW)]
)
def test_u_nets_are_trained_whole_too(recipe, overrides, tmp_path):
    pipe = attar.compress(
        unets.make("sd"), recipe, overrides={**overrides, "trace.prompts": 1}, prompts=unets.PROMPTS[:1],
        generation={**unets.GENERATION, "num_inference_steps": 4},
    )  # fmt: skip
    learned = pipe.attar_compression.components["unet"]["finetune"]
    assert learned["samples"] == 4 and 0 < learned["error_after"] < 1
    assert any(isinstance(module, PatchLinear) for module in pipe.unet.modules())
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    with use_backend("reference"):
        torch.testing.assert_close(unets.generate(again), unets.generate(pipe), atol=1e-5, rtol=0)


@pytest.mark.slow(but=["wan-qvgen-overrides0", "dit-mpq-dm-overrides2"])
@pytest.mark.parametrize(
    ("name", "recipe", "overrides"),
    [
        ("wan", "qvgen", QVGEN),
        ("flux", "attar-ptq", POLISH),  # blocks of two kinds
        ("dit", "mpq-dm", EFFICIENT),  # looks at what the last block gives
        ("sd", "quest", {**FEW, "trace.prompts": 1}),  # and at layers inside
    ],
)
def test_checkpoints_change_no_bit_and_keep_less(name, recipe, overrides, monkeypatch):
    train, kept = Finetuner.train, []

    def watched(self, after):
        def note(tensor):
            kept[-1] += tensor.nbytes
            return tensor

        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            train(self, after)

    monkeypatch.setattr(Finetuner, "train", watched)
    results = []
    for checkpoints in (False, True):
        changes = {**overrides, "finetune.gradient_checkpointing": checkpoints}
        if name == "sd":
            generation = {**unets.GENERATION, "num_inference_steps": 4}
            pipe = attar.compress(
                unets.make("sd"), recipe, overrides=changes, prompts=unets.PROMPTS[:1], generation=generation
            )
        else:
            pipe = compressed(name, recipe, changes)
        model = pipe.unet if name == "sd" else pipe.transformer
        results.append({key: tensor for key, tensor in model.state_dict().items()})
        assert not any("forward" in vars(module) for module in model.modules())
    plain, again = results
    assert all(torch.equal(tensor, again[key]) for key, tensor in plain.items())
    assert kept[1] < 0.5 * kept[0]


def test_a_training_that_runs_out_of_memory_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(finetuning, "SAVE_SECONDS", 0.0)
    update, enough, steps = Finetuner._update, [], []

    def limited(self):
        if self.step == 3 and not enough:
            raise torch.OutOfMemoryError("CUDA out of memory")
        steps.append(self.step)
        return update(self)

    monkeypatch.setattr(Finetuner, "_update", limited)
    with pytest.raises(
        AttarError, match=r"in training step 4 \[transformer\]. Run again with .*checkpointing"
    ):
        compressed("dit", "qvgen", QVGEN, workspace=tmp_path)
    enough.append(True)
    compressed("dit", "qvgen", {**QVGEN, "finetune.gradient_checkpointing": True}, workspace=tmp_path)
    assert steps == [0, 1, 2, 3, 4, 5]


def test_branches_of_unequal_shape_are_samples_of_their_own():
    """A negative prompt of another length: the pipeline calls the transformer with texts that fit no batch."""
    options = {
        "overrides": {**FEW, "trace.prompts": 1, "finetune.batch_size": 1},
        "prompts": pipelines.PROMPTS[:1],
    }
    pipe = pipelines.make("wan")
    encode = pipe.encode_prompt

    def uneven(*args, **kwargs):
        text, negative = encode(*args, **kwargs)
        return text, negative[:, :-1]

    pipe.encode_prompt = uneven
    case = pipelines.CASES["wan"]
    call = {**case.generation, "num_inference_steps": case.steps}
    attar.compress(pipe, "quantized-distillation", generation=call, **options)
    learned = pipe.attar_compression.components["transformer"]["finetune"]
    assert learned["samples"] == 2 * case.steps


def test_training_longer_lowers_the_error():
    report = compressed("wan", "qvgen", {**QVGEN, "finetune.steps": 60, "finetune.weight_lr": 1e-3})
    learned = report.attar_compression.components["transformer"]["finetune"]
    assert learned["error_after"] < 0.8 * learned["error_before"]


def test_each_component_changes_the_result():
    def codes(recipe, overrides):
        pipe = compressed("wan", recipe, overrides)
        return {n: layer.codes.clone() for n, layer in packed_layers(pipe.transformer).items()}

    found = [
        codes("rtn", {"quantize.acts": 4}),
        codes("qvgen", QVGEN),
        codes("qvgen", {**QVGEN, "finetune.auxiliary_rank": 0}),
        codes("efficientdm", {**EFFICIENT, "finetune.adapter_lr": 0.5, "finetune.clip_lr": 0}),
    ]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert any(not torch.equal(one[name], other[name]) for name in one)


def test_layers_can_be_chosen():
    def codes(rate):
        rates = {f"finetune.{key}_lr": 1e-12 for key in ("clip", "auxiliary")} | {"finetune.weight_lr": rate}
        pipe = compressed("wan", "qvgen", {**QVGEN, **rates, "finetune.layers": ["ffn.*"]})
        return {name: layer.codes for name, layer in packed_layers(pipe.transformer).items()}

    before, after = codes(1e-12), codes(1e-2)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".ffn." in name for name in changed)
    with pytest.raises(AttarError, match="no quantized layer is called so"):
        compressed("wan", "qvgen", {**QVGEN, "finetune.layers": ["convs.*"]})


def test_polishing_keeps_the_codes_and_lowers_the_error():
    steps = {"finetune.steps": 40, "finetune.batch_size": 6}
    plain = compressed("wan", "attar-ptq", {k: v for k, v in POLISH.items() if not k.startswith("finetune")})
    pipe = compressed("wan", "attar-ptq", POLISH | steps)
    learned = pipe.attar_compression.components["transformer"]["finetune"]
    assert learned["error_after"] < 0.95 * learned["error_before"]
    before, after = (packed_layers(p.transformer) for p in (plain, pipe))
    assert all(torch.equal(layer.codes, before[name].codes) for name, layer in after.items())
    assert any(
        not torch.equal(layer.weight_scale, before[name].weight_scale) for name, layer in after.items()
    )


@pytest.mark.slow(but=["qvgen-overrides0"])
@pytest.mark.parametrize(("recipe", "overrides"), [("qvgen", QVGEN), ("attar-ptq", POLISH)])
def test_a_run_stopped_while_it_trains_goes_on_to_the_same_bytes(recipe, overrides, monkeypatch, tmp_path):
    monkeypatch.setattr(finetuning, "SAVE_SECONDS", 0.0)

    class Stopped(Exception):
        pass

    class Stopping(SilentProgress):
        def task(self, name, total):
            inner = super().task(name, total)
            return _stopping(inner) if name.endswith("train") else inner

    from contextlib import contextmanager

    @contextmanager
    def _stopping(inner):
        with inner as advance:

            def after(done, note=""):
                advance(done, note)
                if done == 4:
                    raise Stopped

            yield after

    whole = compressed("wan", recipe, overrides, workspace=tmp_path / "whole")
    with pytest.raises(Stopped):
        compressed("wan", recipe, overrides, workspace=tmp_path / "stopped", progress=Stopping())
    state = tmp_path / "stopped" / "transformer" / "finetune.safetensors"
    assert any("exp_avg of " in key for key in load_file(state))
    sparing = {**overrides, "finetune.gradient_checkpointing": True}  # as one would who ran out of memory
    again = compressed("wan", recipe, sparing, workspace=tmp_path / "stopped")
    first, second = (p.attar_compression.components["transformer"]["finetune"] for p in (whole, again))
    assert first == second
    files = [contents(tmp_path / name / "transformer") for name in ("whole", "stopped")]
    assert files[0] == files[1]
    assert not any("finetune.safetensors" in str(k) or "outputs" in str(k) for k in files[0])


def test_the_dry_run_and_the_plan_know_it(cli, wan_folder):
    done = cli("compress", wan_folder, "--dry-run", "--json", "--recipe", "qvgen", *OPTIONS)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["seconds"] >= result["trace_seconds"] > 0 and result["peak_bytes"] > 0

    def costs(recipe, *options):
        plan = ("plan", "digits-video", "--gpu", "h200", "--json", "--recipe", recipe)
        return json.loads(cli(*plan, *options).out)["calibration"]

    trained, longer = costs("qvgen"), costs("qvgen", "--set", "finetune.steps=2000")
    assert longer["learn_seconds"] > 1.5 * trained["learn_seconds"] > 0
    assert trained["device"] > 3 * costs("rtn")["device"]
    assert trained["device"] > costs("efficientdm")["device"]  # which keeps no moments of the weights


def test_what_is_refused(cli, wan_folder, tmp_path):
    def refused(*options):
        return cli(
            "compress", wan_folder, "-o", tmp_path / "out", "--recipe", "qvgen", *OPTIONS, *options
        ).message

    assert "the codes stay" in refused("--set", "reconstruct={}")
    assert "set select to null" in refused("--set", "select={}")
    assert "it needs reconstruct" in refused("--set", "finetune.scale_lr=1e-3")
    for option in ("--workspace", tmp_path / "work"), ("--dry-run",):  # before anything is traced or claimed
        assert "no quantized layer is called so" in refused("--set", "finetune.layers=[convs.*]", *option)
        assert "needs its weights in memory" in refused("--stream", *option)
        assert "too few for 2 phases" in refused("--set", "finetune.steps=1", *option)
    assert not (tmp_path / "work").exists()
    assert "nothing is trained" in refused("--set", "finetune.weight_lr=0", "--set", "finetune.clip_lr=0")
    alone = ("finetune.weight_lr=0", "finetune.auxiliary_rank=0", "finetune.clip_lr=1e-3")
    off = ("quantize.weight_clip=false", "quantize.act_clip=false")
    settings = [part for setting in (*alone, *off) for part in ("--set", setting)]
    for option in ("--workspace", tmp_path / "work"), ("--dry-run",):
        assert "there are no clipping factors" in refused(*settings, *option)
    assert not (tmp_path / "work").exists()
    assert "unknown key 'finetune.step'" in refused("--set", "finetune.step=3")
    assert "trace" in refused("--set", "trace=null")
    assert not (tmp_path / "out").exists()


def test_a_model_that_training_broke_is_not_saved():
    """The loss of the only step is finite, and what the step leads to is not."""
    wild = {"finetune.steps": 1, "finetune.auxiliary_rank": 0, "finetune.weight_lr": 1e38}
    with pytest.raises(AttarError, match="the error of the trained model is"):
        compressed("wan", "qvgen", FEW | wild)


def test_recipes_say_what_they_train():
    assert load_recipe("qvgen").finetune.auxiliary_rank == 32
    assert load_recipe("efficientdm").finetune.weight_lr == 0
    assert load_recipe("rtn").finetune is None and load_recipe("qvgen").needs_data


@pytest.mark.slow
def test_layers_that_are_compared_come_nearer_to_the_original():
    """QuEST's local supervision: with it, the time projections are nearer to their own outputs."""

    def distance(weight):
        fixed = {"finetune.steps": 30, "finetune.weight_lr": 3e-3, "finetune.local_weight": weight}
        pipe = attar.compress(
            unets.make("sd"), "quest", overrides={**FEW, **fixed, "trace.prompts": 1}, prompts=unets.PROMPTS[:1],
            generation={**unets.GENERATION, "num_inference_steps": 4},
        )  # fmt: skip
        original, x, total = unets.make("sd"), torch.randn(8, 64), 0.0
        for name, layer in packed_layers(pipe.unet).items():
            if name.endswith("time_emb_proj"):
                exact = original.unet.get_submodule(name)(x)
                total += float(((layer(x) - exact).square().sum() / exact.square().sum()).detach())
        assert total > 0
        return total

    assert distance(100.0) < distance(1e-6)


@pytest.mark.parametrize("recipe, overrides", [("quantized-distillation", FEW), ("efficientdm", EFFICIENT)])
def test_weights_are_held_once_while_training(recipe, overrides, monkeypatch):
    linears = []
    wrap = finetuning.wrap_linears

    def wrapped(*args):
        layers = wrap(*args)
        linears.extend(weakref.ref(linear) for linear in args[2].values())
        return layers

    def train(tuner, *_, **__):
        gc.collect()
        assert len(linears) == 30 and not any(linear() for linear in linears)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "wrap_linears", wrapped)
    monkeypatch.setattr(Finetuner, "train", train)
    with pytest.raises(KeyboardInterrupt):
        compressed("wan", recipe, overrides)
