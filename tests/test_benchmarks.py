"""The benchmark's cells are valid recipes, and its tables follow from its results."""

import copy
import json
from pathlib import Path

import pytest
import torch

from attar.models.source import find_source, load_pipeline
from attar.recipe import load_recipe
from benchmarks import budget, forecast, step_groups, streaming, synthesis
from benchmarks.cells import LATER, STUDIES, digest
from benchmarks.outliers import CHANNELS, FACTOR, plant_outliers
from benchmarks.tables import write_tables


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda s: s.name)
def test_every_method_is_a_recipe_of_its_own(study):
    seen = {}
    for method in study.methods:
        recipe = method.resolve(study.bits[0])
        settings = recipe.model_dump(exclude={"name", "summary", "notes", "paper"})
        assert str(settings) not in seen.values(), f"{method.name} repeats another method"
        seen[method.name] = str(settings)


def test_settings_that_came_later_count_only_where_they_change_something(monkeypatch):
    recipe = load_recipe("s2q-vdit")
    content = recipe.model_dump()
    content["quantize.low_rank"] = load_recipe("svdquant").quantize.low_rank.model_dump()
    content["allocate"] = load_recipe("attar-mixed").allocate.model_dump()
    for stage, former in LATER.items():
        assert former.items() <= content[stage].items()
    before = digest(recipe)
    for setting, value in {"quantize.clip_start": 3.0, "select.neighbour": "previous"}.items():
        assert digest(load_recipe("s2q-vdit", {setting: value})) != before
    spared = [load_recipe("qvgen", {"finetune.gradient_checkpointing": on}) for on in (False, True)]
    assert digest(spared[0]) == digest(spared[1])  # the result is the same
    monkeypatch.setattr("benchmarks.cells.LATER", {})
    assert digest(recipe) != before  # else the cells of the results file would all be stale


def test_a_digest_knows_nothing_of_what_the_bits_do_not_call_for():
    branches = [
        load_recipe("attar", {"quantize.low_rank": branch}) for branch in (None, {"rank": 8, "acts": 4})
    ]
    assert len(set(map(digest, branches))) == 1  # at six bits of activations
    few = [
        load_recipe("attar", {"quantize.low_rank": r.quantize.low_rank, "quantize.acts": 4}) for r in branches
    ]
    assert len(set(map(digest, few))) == 2


def test_the_faithful_recipe_differs_from_its_base_in_two_ideas_and_the_rounding():
    main = {m.name: load_recipe(m.recipe, m.overrides) for m in STUDIES["main"].methods}
    base, full = main["learned base"], main["S²Q-VDiT (with GPTQ)"]
    assert (base.select.policy, full.select.policy) == ("random", "salient")
    assert (base.reconstruct.loss, full.reconstruct.loss) == ("mse", "token_weighted")
    assert base.quantize == full.quantize
    assert main["S²Q-VDiT without GPTQ"].rounding.method == "nearest"


def test_tables_pair_cells_over_seeds(tmp_path):
    def cell(error: float) -> dict:
        return {
            "block_errors": [error, error],
            "calibration_errors": [[None, None]],
            "calibration_cpu_seconds": 1.0,
            "chosen": [[0, 0], [1, 49]],
            "prompts": STUDIES["selection"].prompts,
        }

    does = {m.name: digest(m.resolve((4, 4))) for m in STUDIES["selection"].methods}
    cells = {f"selection|random|W4A4|{s}": {**cell(0.1), "recipe": does["random"]} for s in range(3)}
    cells |= {f"selection|salient|W4A4|{s}": {**cell(0.12), "recipe": does["salient"]} for s in range(3)}
    cells["selection|lowest|W4A4|0"] = {**cell(0.5), "recipe": "of another day"}
    text = write_tables({"cells": cells}, tmp_path / "quality.md")
    assert "| salient | 20.0 ± 0.0 | – | – |" in text
    assert "| salient | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 1 | 2 |" in text
    assert "| lowest |" not in text
    assert (tmp_path / "quality.md").read_text() == text


def test_planted_outliers_change_what_linears_see_and_not_what_the_model_computes():
    model = load_pipeline(find_source("digits-video")).transformer
    planted = copy.deepcopy(model)
    plant_outliers(planted)
    generator = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 8, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 12, 128, generator=generator),
        "return_dict": False,
    }

    def run(transformer):
        seen = []
        for name in ("attn1.to_q", "attn2.to_q", "ffn.net.0.proj"):
            linear = transformer.blocks[4].get_submodule(name)
            linear.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        with torch.no_grad():
            return transformer(**call)[0], seen

    (before, plain), (after, enlarged) = run(model), run(planted)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    factors = torch.ones(256)
    factors[list(CHANNELS)] = FACTOR
    for x, y in zip(plain, enlarged, strict=True):
        torch.testing.assert_close(y, x * factors, rtol=1e-2, atol=1e-3)


def test_the_streaming_figures_in_the_docs_are_the_measured_ones():
    content = json.loads(streaming.RESULTS.read_text())
    page = (Path(__file__).parents[1] / "docs" / "compress.md").read_text(encoding="utf-8")
    for line in streaming.table(content).splitlines():
        assert line in page
    assert all(row["peak_gb"] < row["bar_gb"] for row in content["cells"].values())
    assert {"rtn", "hadamard", "smoothquant"} <= set(content["cells"])


def test_the_forecasts_in_the_docs_are_the_measured_ones_and_came_true():
    content = json.loads(forecast.RESULTS.read_text())
    page = (Path(__file__).parents[1] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert forecast.table(content) in page
    ratios = [row["ratio"] for rows in content["blocks"].values() for row in rows.values()]
    assert len(ratios) >= 6 and all(abs(ratio - 1) <= forecast.TOLERANCE for ratio in ratios)


def test_the_figures_of_groups_of_steps_in_the_docs_are_the_measured_ones():
    content = json.loads(step_groups.RESULTS.read_text())
    page = (Path(__file__).parents[1] / "docs" / "budget.md").read_text(encoding="utf-8")
    assert step_groups.table(content["cells"]) in page


def test_the_figures_of_synthesised_data_in_the_docs_are_the_measured_ones():
    content = json.loads(synthesis.RESULTS.read_text())
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert synthesis.table(content["cells"]) in page
    assert content["steps"] == synthesis.STEPS
    assert synthesis.recipe_table(json.loads(synthesis.RECIPES.read_text())["cells"]) in page


def test_budgets_table_pairs_plans_over_seeds():
    def cell(error, size, **more):
        return {
            "block_errors": [error, error],
            "linear_bytes": size,
            "together": 1.1,
            "predicted": 1.0,
            **more,
        }

    cells = {f"rtn|W3A6|uniform|{seed}": cell(0.1, 100, psnr=[20.0, 22.0]) for seed in (0, 1)}
    cells |= {f"rtn|W3A6|mixed|{seed}": cell(0.05, 100, psnr=[24.0, 26.0]) for seed in (0, 1)}
    cells["rtn|W3A6|0dB|0"] = cell(0.1, 90)
    row = budget.table(cells).splitlines()[-1]
    assert row.startswith(
        "| `rtn` | W3A6 | 2 | 0.1000 ± 0.0000 | 0.0500 ± 0.0000 | -3.01 ± 0.00 dB | 1.10 ± 0.00 |"
    )
    assert row.endswith("| 21.00 ± 0.00 → 25.00 ± 0.00 | -10.0 % | 0.00 dB |")
    del cells["rtn|W3A6|0dB|0"]
    assert budget.table(cells).splitlines()[-1].endswith("| – | – |")


def test_every_part_of_a_picture_system_changes_its_recipe():
    from benchmarks import picture_parts, pictures

    for part in picture_parts.PARTS:
        bits = {"quantize.weights": 4, "quantize.acts": 4}
        whole, other = (load_recipe(part.system, {**more, **bits}) for more in ({}, part.overrides))
        assert whole != other and part.sides.index(part.system) == part.default
        assert part.system in pictures.TRAINED and part.other in pictures.NAMES


def test_pictures_are_tabled_by_model_and_bits():
    from benchmarks import picture_parts, pictures

    cell = {"psnr": [30.0, 32.0], "ssim": [0.9, 0.8], "frechet": 0.5, "right": 0.75, "reference_right": 1.0}
    cells = {
        "digits-image|quest|W4A4|0": {
            **cell,
            "linears": 0.3,
            "calibration_cpu_seconds": 60.0,
            "latent_error": [0.125, 0.25, 9.0],
        },
        "digits-image|rtn|W4A4|0": {**cell, "psnr": [20.0, 20.0], "linears": 0.25},
        "digits-image|rtn|W4A4|1": {**cell, "psnr": [22.0, 22.0], "linears": 0.25},
    }
    cells |= {
        "digits-image|quest, all layers|W4A4|0": {**cell, "psnr": [29.0, 30.5], "linears": 0.3},
        "digits-image|quest, all layers|W4A4|1": {**cell, "linears": 0.3},
        "digits-image|quantized-distillation, trained numbers|W4A4|0": {**cell, "linears": 0.3},
        "digits-image|quantized-distillation|W4A4|0": {**cell, "psnr": [29.0, 32.0], "linears": 0.3},
    }
    parts = picture_parts.rows(cells, ("W4A6", "W4A4"))
    assert parts[0] == ["quest", "chosen layers alone", "W4A4", "1", "+1.25 ± 3.18", "0.3000× → 0.3000×"]
    assert parts[1][:4] == ["quantized-distillation", "trained numbers", "W4A4", "1"] and len(parts) == 2
    assert parts[1][4].startswith("+0.50 ± ")
    text = pictures.table(pictures.rows_of(cells), parts)
    assert "| quest | chosen layers alone | W4A4 |" in text and "| quest, all layers |" not in text
    assert "## digits-image, W4A4" in text and "digits-dit, " not in text
    rows = [line for line in text.splitlines() if line.startswith(("| quest", "| rtn"))]
    assert rows[0].startswith("| quest | 1 | 0.300× | 31.00 | 0.8500 | 0.2500 | 0.5000 | 75.0 (100.0) | 60 |")
    assert rows[1].startswith("| rtn | 2 | 0.250× | 21.00 ± ")


def test_figures_of_fewer_seeds_than_the_row_say_so():
    from benchmarks import pictures, tables

    cells = [{"a": 1.0}, {"a": 2.0}, {}]
    found = [
        tables.over_cells(some, lambda c: c.get("a"), 1) for some in (cells, cells[1:], cells[2:], cells[:2])
    ]
    assert found == ["1.5 ± 6.4 (2 seeds)", "2.0 (1 seed)", "–", "1.5 ± 6.4"]
    cell = {
        "psnr": [20.0],
        "ssim": [0.9],
        "frechet": 0.5,
        "right": 1.0,
        "reference_right": 1.0,
        "linears": 0.25,
    }
    rows = pictures.rows_of(
        {
            f"digits-dit|rtn|W4A4|{seed}": {**cell, **({} if seed else {"calibration_cpu_seconds": 7})}
            for seed in (0, 1)
        }
    )
    assert rows[0].figures()[-1] == "7 (1 seed)"


def test_the_pages_of_quality_budgets_and_peers_are_those_of_the_results(tmp_path):
    from benchmarks.peers import __main__ as peers
    from benchmarks.peers.table import write_table
    from benchmarks.quality import RESULTS

    docs = Path(__file__).parents[1] / "docs"
    results = json.loads(RESULTS.read_text())
    assert write_tables(results, tmp_path / "quality.md") == (docs / "quality.md").read_text(encoding="utf-8")
    beside = json.loads(peers.RESULTS.read_text())
    assert write_table(beside, tmp_path / "peers.md") == (docs / "peers.md").read_text(encoding="utf-8")
    for image in (tmp_path / "images").iterdir():
        assert image.read_text() == (docs / "images" / image.name).read_text()
    page = (docs / "budget.md").read_text(encoding="utf-8")
    assert budget.table(json.loads(budget.RESULTS.read_text())["cells"]) in page


def test_the_loss_by_bits_by_layer_in_the_docs_is_the_measured_one():
    from benchmarks.pictures import RESULTS

    cells = json.loads(RESULTS.read_text())["cells"]
    page = " ".join((Path(__file__).parents[1] / "docs" / "budget.md").read_text(encoding="utf-8").split())
    mixed, same = (cells[f"digits-dit|{name}|W4A4|0"]["psnr"] for name in ("attar-mixed", "attar-ptq"))
    said = f"`attar-mixed` has {sum(mixed) / len(mixed):.2f} dB and `attar-ptq` {sum(same) / len(same):.2f}"
    assert said in page
