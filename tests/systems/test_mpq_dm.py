"""MPQ-DM (arXiv 2412.11549) and MPQ-DMv2 (arXiv 2507.04290): bits by rows, and the whole of both.

Numbers: tests/quantize/test_row_bits.py, test_row_tables.py; losses: tests/losses/test_relation.py.
"""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from support import pipelines, unets
from support.toy import WEIGHTS, Toy
from torch import nn
from torch.nn.functional import normalize

import attar
from attar.quantize.finetune import FinetuneSettings
from attar.quantize.initialize import build_transforms
from attar.quantize.linear import QuantizedLinear
from attar.quantize.relations import FEATURES, RelationSettings, RelationTerm, draw_memory
from attar.quantize.row_tables import residual_start
from attar.quantize.terms import LowRankTerm
from attar.recipe import load_recipe
from attar.runtime.layers import packed_layers
from attar.runtime.patches import PatchLinear
from attar.settings import relation_settings, transform_settings
from attar.workspace import Workspace

ADAPTERS = FinetuneSettings(steps=40, batch_size=7, adapter_rank=4, adapter_lr=0.05, clip_lr=1e-2)
FEW = {"trace.prompts": 2, "finetune.steps": 6, "finetune.batch_size": 2, "finetune.adapter_rank": 2}
V1, V2 = (
    ("mpq-dm", FEW),
    ("mpq-dmv2", {**FEW, "finetune.relation.memory": 64, "finetune.relation.anchors": 16}),
)
# tiny random models have rows of nearly equal tails, so kurtosis moves no bits there; their errors do
BY_ERROR = {"quantize.row_bits.by": "error"}


def compressed(name, recipe, overrides, **options):
    case = pipelines.CASES[name]
    generation = {**case.generation, "num_inference_steps": case.steps}
    given = dict(prompts=pipelines.PROMPTS[:2], generation=generation)
    return attar.compress(pipelines.make(name), recipe, overrides=overrides, **{**given, **options})


@pytest.mark.slow(but=["wan-mpq-dm-overrides0"])
@pytest.mark.parametrize(("recipe", "overrides"), [V1, V2])
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_a_pipeline_is_trained_packed_and_loaded(name, recipe, overrides, tmp_path):
    small = compressed(name, recipe, overrides | BY_ERROR)
    layers = packed_layers(small.transformer)
    mixed = [layer for layer in layers.values() if layer.rows is not None]
    assert mixed and all(
        sum(k.bits * k.count for k in layer.rows) == 4 * layer.out_features for layer in mixed
    )
    tables = recipe == "mpq-dmv2"
    assert all((layer.levels is not None) == tables for layer in mixed)
    small.save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 4
    again = DiffusionPipeline.from_pretrained(tmp_path / "small")
    again.set_progress_bar_config(disable=True)
    pipelines.assert_same_model(small, again, name)
    attar.verify_folder(tmp_path / "small")


@pytest.mark.slow
def test_a_u_net_compares_the_features_before_its_head(tmp_path):
    overrides = {**V1[1], **BY_ERROR}
    made = [
        attar.compress(
            unets.make("sd"), "mpq-dm", overrides={**overrides, **more}, prompts=unets.PROMPTS[:2],
            generation={**unets.GENERATION, "num_inference_steps": 4},
        )
        for more in ({}, {"finetune.relation": None})
    ]  # fmt: skip
    reports = [pipe.attar_compression.components["unet"]["finetune"] for pipe in made]
    assert reports[0]["history"][0][1] > reports[1]["history"][0][1]  # the term is in the loss
    assert any(layer.rows is not None for layer in packed_layers(made[0].unet).values())
    made[0].save_pretrained(tmp_path / "small")
    again = DiffusionPipeline.from_pretrained(tmp_path / "small")
    for name, layer in packed_layers(again.unet).items():
        own = packed_layers(made[0].unet)[name]
        assert all(torch.equal(t, own.state_dict()[key]) for key, t in layer.state_dict().items())


@pytest.mark.slow
def test_directions_are_learned_in_a_pipeline(tmp_path):
    """BiBERT's relation is lowered where it is nearly all of the loss, and trains other codes than the divergence."""
    longer = {
        **V1[1],
        **BY_ERROR,
        "finetune.steps": 20,
        "finetune.adapter_lr": 0.05,
        "finetune.relation.weight": 100,
    }
    small, other = (
        compressed("wan", "mpq-dm", {**longer, "finetune.relation.kind": kind})
        for kind in ("direction", "divergence")
    )
    history = small.attar_compression.components["transformer"]["finetune"]["history"]
    assert 0 < history[0][1] < 100 * 2**0.5 and history[-1][1] < 0.85 * history[0][1]
    layers = packed_layers(other.transformer)
    codes = [(layer.codes, layers[name].codes) for name, layer in packed_layers(small.transformer).items()]
    assert any(one.shape != two.shape or not torch.equal(one, two) for one, two in codes)
    small.save_pretrained(tmp_path)
    pipelines.assert_same_model(small, DiffusionPipeline.from_pretrained(tmp_path), "wan")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    from attar import finetuning

    class Killed(BaseException):
        pass

    def run(folder, kill=False):
        with monkeypatch.context() as m:
            m.setattr(finetuning, "SAVE_SECONDS", 0.0)
            if kill:
                seen = []

                def write(self, file, *rest, own=Workspace.write_tensors):
                    own(self, file, *rest)
                    if "finetune" in file:
                        seen.append(file)
                        if len(seen) == 3:
                            raise Killed

                m.setattr(Workspace, "write_tensors", write)
            return compressed("wan", V2[0], V2[1] | BY_ERROR, workspace=folder)

    with pytest.raises(Killed):
        run(tmp_path / "killed", kill=True)
    resumed, whole = run(tmp_path / "killed").transformer, run(tmp_path / "whole").transformer
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_starting_from_the_error_leaves_the_codes_and_gives_both_factors_gradients():
    """MPQ-DMv2's proof list 7: Eckart-Young, nearly all codes, and gradients of A that a zero start does not have."""
    toy = Toy(bits=3, width=64)
    layer = toy.layers["0"]
    weight = layer.transformed_weight()
    before, rounded = layer.quantizer.quantize(weight)[0], layer.rounded(weight)
    error = weight - rounded
    toy.tuner(replace(ADAPTERS, adapter_rank=8, adapter_start="error"))
    term = layer.adapter
    values = torch.linalg.svdvals(error)
    left = (error - term()).detach().square().sum()
    assert float(left) == pytest.approx(float(values[8:].square().sum()), rel=1e-3)
    codes = layer.quantizer.quantize(layer.transformed_weight())[0]
    assert (codes == before).float().mean() > 0.97
    assert torch.allclose(layer.weight, rounded, atol=1e-6)
    toy.run(toy.samples[0][0])["y"].square().sum().backward()
    assert term.up.grad.norm() > 0 and term.down.grad.norm() > 0
    zero = Toy(bits=3, width=64)
    zero.tuner(replace(ADAPTERS, adapter_rank=8))
    zero.run(zero.samples[0][0])["y"].square().sum().backward()
    assert zero.layers["0"].adapter.up.grad.norm() > 0 == zero.layers["0"].adapter.down.grad.norm()


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_the_rounded_base_has_the_codes_and_scales_of_the_weight(bits):
    toy = Toy(bits=bits, width=64)
    layer = toy.layers["0"]
    codes, scale = layer.quantizer.quantize(layer.transformed_weight())
    toy.tuner(replace(ADAPTERS, adapter_start="rounded"))
    again, other = layer.quantizer.quantize(layer.transformed_weight())
    assert torch.equal(again, codes)
    torch.testing.assert_close(other, scale, rtol=2e-3, atol=0)


def test_added_to_the_full_precision_weight_the_error_makes_things_worse():
    """The spec's table: Q(W + BA) with BA ≈ W - Q(W) shifts weights off the nearest codes."""
    toy = Toy(bits=3, width=64)
    layer = toy.layers["0"]
    weight = layer.transformed_weight()
    plain = (layer.rounded(weight) - weight).square().sum()
    layer.adapter = LowRankTerm.leading(weight - layer.rounded(weight), 16)
    shifted = (layer.rounded(layer.transformed_weight()) - weight).square().sum()
    assert shifted > 1.1 * plain


def test_beside_the_rounded_weight_the_error_is_the_better_start():
    """MPQ-DMv2's proof list 8. (Beside the weight itself, which knows more than a low rank of it, none is needed.)"""
    early, late, last = {}, {}, {}
    for start in ("rounded", "error", "zero"):
        for seed in range(3):
            toy = Toy(bits=3, width=32, seed=seed)
            before = toy.error()
            settings = replace(ADAPTERS, adapter_start=start, adapter_rank=8, steps=120, max_norm=None)
            tuner = toy.tuner(settings)
            tuner.train()
            early[start] = early.get(start, 0) + tuner.history[11][1]
            late[start] = late.get(start, 0) + toy.error()
            last[start] = last.get(start, 0) + tuner.history[-1][1]
            assert toy.error() < before
    assert early["error"] < early["rounded"]
    assert last["rounded"] - last["error"] < 0.5 * (early["rounded"] - early["error"])  # the gap shrinks
    assert late["zero"] < late["error"]


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}])
def test_prescaling_changes_no_convolution(options):
    """MPQ-DM's proof list 1: layer(X / δ, W δ) = layer(X, W) to 1e-5, padding included, without rounding."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(5, 7, 3, **options).requires_grad_(False), torch.randn(2, 5, 8, 9)
    x[:, 2] *= 30
    expected, patch = conv(x), PatchLinear(conv)
    linear = patch.linear
    seen = patch.patches(x).flatten(0, 2).abs().amax(0)
    settings = transform_settings(load_recipe("mpq-dm"))
    transforms = build_transforms(linear, seen, settings, torch.Generator().manual_seed(0))
    layer = patch.linear = QuantizedLinear(linear, 4, 4, transforms)
    delta = (seen / conv.weight.flatten(1).abs().amax(0)).sqrt()  # the paper's, √(max |X| / max |W|)
    torch.testing.assert_close(layer.transform_input(torch.ones(1, 45))[0], 1 / delta)
    layer.weight_quant = layer.act_quant = False
    with torch.no_grad():
        assert ((patch(x) - expected).norm() / expected.norm()).item() < 1e-5


def test_the_mean_magnitude_is_the_best_size_of_a_residual():
    """MPQ-DMv2's proof list 1: α = mean |r| has a smaller error than α (1 ± 0.1), and ‖r - αβ‖² = ‖r‖² - n α²."""
    rows = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)).double()
    rows /= rows.abs().amax(1, keepdim=True)
    lowest, step, size = (p[:, None] for p in residual_start(rows, 3).unbind(-1))
    rest = rows - lowest - step * ((rows - lowest) / step).round().clamp(0, 3)

    def error(factor):
        return (rest - factor * size * rest.sign()).square().sum(1)

    assert (error(1.0) < error(0.9)).all() and (error(1.0) < error(1.1)).all()
    torch.testing.assert_close(
        error(1.0), rest.square().sum(1) - 200 * size[:, 0].square(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("acts", [None, 8])
def test_two_products_of_grid_and_plane_give_the_output_of_the_table(acts):
    """MPQ-DMv2's proof list 6: X Gᵀ + α X Bᵀ, B of ±1. Where the parameters are exact in half precision, as the packed
    table is, the packed layer too is the same to 1e-5."""
    torch.manual_seed(0)
    layer = QuantizedLinear(
        nn.Linear(48, 6), 4, acts, weight_clip=False, act_clip=False, weight_format="residual"
    )
    table = layer.quantizer.kinds[0].table
    step = torch.tensor([0.1875, 0.21875, 0.25, 0.1875, 0.21875, 0.25])
    lowest, size = -3.5 * step, torch.tensor([0.03125, 0.0625]).repeat(3)
    table.data.copy_(torch.stack([lowest, step, size], dim=-1).view_as(table))
    x = torch.randn(9, 48)
    with torch.no_grad():
        weight, scale = layer.weight, layer.weight.abs().amax(1)
        nearest = ((weight / scale[:, None] - lowest[:, None]) / step[:, None]).round().clamp(0, 7)
        grid = lowest[:, None] + step[:, None] * nearest
        plane = torch.where(weight / scale[:, None] >= grid, 1.0, -1.0)
        inputs = layer.quantized_input(x)[1]
        products = (inputs @ grid.T + size * (inputs @ plane.T)) * scale + layer.bias
        torch.testing.assert_close(layer(x), products, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.bake()(x), products, atol=1e-5, rtol=0)


def test_with_relations_to_the_memory_features_drift_less_from_step_to_step():
    """MPQ-DMv2's proof list 11: cos(F_i^q, F_j^f) beside cos(F_i^f, F_j^f) over all pairs of steps, at three bits with
    the recipe's weight. (At two bits it is the other way round: docs/methods.md.)"""
    chosen = relation_settings(load_recipe("mpq-dmv2"))

    def drift(seed, related):
        toy = Toy(bits=3, acts=8, width=32, seed=seed)
        full, term, plain = [target["y"] for _, target in toy.samples], None, toy.run
        if related:
            for _, target in toy.samples:
                target[FEATURES] = target["y"].clone()
            term = RelationTerm(chosen, draw_memory(toy.samples, 35, "0"))
            toy.run = lambda call: plain(call) | {FEATURES: plain(call)["y"]}
        toy.tuner(replace(WEIGHTS, steps=60, batch_size=7, clip_lr=1e-2), relation=term).train()
        with torch.no_grad():
            ours = normalize(torch.cat([plain(call)["y"] for call, _ in toy.samples]), dim=-1)
        full = normalize(torch.cat(full), dim=-1)
        pairs = torch.einsum("ipc,jqc->ijpq", ours - full, full)
        return float(pairs.square().mean())

    for seed in range(3):
        assert drift(seed, True) < drift(seed, False)


@pytest.mark.parametrize("kind", ["divergence", "direction"])
def test_the_relation_of_features_is_what_training_lowers(kind):
    """The student's relations come nearer to the teacher's; with features that are detached nothing would."""

    def made(weight, bits=3):
        toy = Toy(bits=bits, acts=8, width=32)
        whole, plain = toy.model, toy.run
        with torch.no_grad():
            for _, target in toy.samples:
                target[FEATURES] = target["y"].clone()
        term = RelationTerm(RelationSettings(weight, window=1, temperature=0.2, kind=kind))

        def run(call):
            return plain(call) | {FEATURES: plain(call)["y"]}

        toy.run = run
        settings = replace(WEIGHTS, steps=60, batch_size=7, weight_lr=1e-3, clip_lr=1e-2)
        tuner = toy.tuner(settings, relation=term, loss=lambda p, t: 0 * p["y"].sum())
        tuner.train()
        return tuner.history, whole

    history, _ = made(1.0)
    assert history[-1][1] < (0.5 if kind == "divergence" else 0.5**0.5) * history[0][1]  # it is no square


def test_the_kind_of_relation_is_left_out_where_it_is_the_former_one():
    assert "kind" not in load_recipe("mpq-dm").model_dump()["finetune"]["relation"]
    changed = load_recipe("mpq-dm", {"finetune.relation.kind": "direction"})
    assert changed.model_dump()["finetune"]["relation"]["kind"] == "direction"
    assert relation_settings(changed).kind == "direction"


def test_windows_pair_consecutive_steps():
    toy, seen = Toy(), []
    plain = toy.run
    for _, target in toy.samples:
        target[FEATURES] = target["y"]

    class Term(RelationTerm):
        def __call__(self, pred, target, steps, update):
            seen.append((pred.shape[0], steps))
            return super().__call__(pred, target, steps, update)

    toy.run = lambda call: plain(call) | {FEATURES: plain(call)["y"]}
    groups = [[0, 1], [2, 3], [4, 5]]
    tuner = toy.tuner(
        replace(WEIGHTS, batch_size=4, steps=6), relation=Term(RelationSettings(1.0, window=2)), groups=groups
    )
    taken = []
    places = tuner._places
    tuner._places = lambda: taken.append(places()) or taken[-1]
    tuner.train()
    assert seen == [(4, 4)] * 6
    assert all(batch[0] % 2 == 0 and batch[1] == batch[0] + 1 for batch in taken)
    assert 6 not in {i for batch in taken for i in batch}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"finetune.batch_size": 3}, "no multiple"),
        ({"quantize.weights": 8}, "would have 9"),
        ({"quantize.weight_format": "nf4"}, "row_bits"),
        ({"allocate.budget": "same"}, "leave one of them out"),
        ({"quantize.group_size": 64}, "leave group_size out"),
        ({"finetune.adapter_start": "error", "finetune.weight_lr": 1e-4}, "leave weight_lr at 0"),
        ({"finetune.adapter_start": "error", "finetune.adapter_rank": 0}, "give them adapter_rank"),
        ({"finetune.adapter_start": "error", "quantize.low_rank": {"rank": 4}}, "no part of"),
        ({"quantize.row_bits.most": 0.05}, "no bit would move"),
        ({"finetune.relation.kind": "direction", "finetune.relation.memory": 64}, "set relation.memory to 0"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, words):
    with pytest.raises(attar.AttarError, match=words):
        load_recipe("mpq-dm", overrides)


def test_row_bits_behind_a_calibration_and_without_data(tmp_path):
    """In a recipe that calibrates block by block, in the default's words, and in one that has no data."""
    few = {
        "trace.prompts": 2,
        "select.count": 3,
        "reconstruct.epochs": 1,
        "quantize.row_bits": {"by": "error"},
    }
    ptq = compressed("hunyuan", "attar-ptq", few)
    plain = pipelines.make("wan")
    for linear in plain.transformer.blocks[0].modules():  # rows of unlike size, so that bits are worth moving
        if isinstance(linear, torch.nn.Linear):
            linear.weight.data *= torch.logspace(-0.5, 0.5, linear.out_features)[:, None]
    rtn = attar.compress(plain, "rtn", overrides={"quantize.row_bits": {"by": "error", "metric": "weight"}})
    for pipe, name in ((ptq, "hunyuan"), (rtn, "wan")):
        assert any(layer.rows is not None for layer in packed_layers(pipe.transformer).values())
        pipe.save_pretrained(tmp_path / name)
        again = DiffusionPipeline.from_pretrained(tmp_path / name)
        again.set_progress_bar_config(disable=True)
        pipelines.assert_same_model(pipe, again, name)


def test_forecast_of_bytes_is_exact_but_for_the_kinds_of_rows(cli, wan_folder, tmp_path):
    options = (
        "--recipe",
        "rtn",
        "--set",
        "quantize.row_bits.by=error",
        "--set",
        "quantize.row_bits.metric=weight",
    )
    said = json.loads(cli("compress", wan_folder, "-o", tmp_path / "x", *options, "--dry-run", "--json").out)
    assert any("W4±1A6" in row["bits"] for row in said["rows"])
    made = json.loads(cli("compress", wan_folder, "-o", tmp_path / "small", *options, "--json").out)
    # whole bytes for the codes of every row, and a byte for its kind, whether or not bits were moved
    spare = sum(
        layer.out_features for layer in packed_layers(attar.load(tmp_path / "small").transformer).values()
    )
    assert 0 <= said["bytes"]["block_linears_packed"] - made["linear_bytes_packed"] <= spare
