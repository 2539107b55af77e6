"""The benchmark's cells are valid recipes, and its tables follow from its results."""

import pytest

from attar.recipe import load_recipe
from benchmarks.cells import STUDIES
from benchmarks.tables import write_tables


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda s: s.name)
def test_every_method_is_a_recipe_of_its_own(study):
    seen = {}
    for method in study.methods:
        recipe = load_recipe(method.recipe, method.overrides)
        settings = recipe.model_dump(exclude={"name", "summary", "notes", "paper"})
        assert str(settings) not in seen.values(), f"{method.name} repeats another method"
        seen[method.name] = str(settings)


def test_the_faithful_recipe_differs_from_its_base_in_two_ideas_and_the_rounding():
    main = {m.name: load_recipe(m.recipe, m.overrides) for m in STUDIES["main"].methods}
    base, full = main["learned base"], main["S²Q-VDiT (with GPTQ)"]
    assert (base.select.policy, full.select.policy) == ("random", "salient")
    assert (base.reconstruct.loss, full.reconstruct.loss) == ("mse", "token_weighted")
    assert base.quantize == full.quantize
    assert main["S²Q-VDiT without GPTQ"].rounding.method == "nearest"


def test_tables_pair_cells_over_seeds(tmp_path):
    def cell(error: float) -> dict:
        return {"block_errors": [error, error], "calibration_seconds": 1.0, "chosen": [[0, 0], [1, 49]]}

    cells = {f"selection|random|W4A4|{s}": cell(0.1) for s in range(3)}
    cells |= {f"selection|salient|W4A4|{s}": cell(0.12) for s in range(3)}
    text = write_tables({"cells": cells}, tmp_path / "quality.md")
    assert "salient: 20.0 ± 0.0 %" in text
    assert "| salient | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 1 | 2 |" in text
    assert (tmp_path / "quality.md").read_text() == text
