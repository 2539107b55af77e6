"""Recipes: what they hold, how they are overridden, and what is refused."""

import pytest
import yaml
from pydantic import ValidationError

from attar.calibration.prompts import GENERAL_PROMPTS
from attar.conductor import calibration_prompts
from attar.errors import AttarError
from attar.models.source import Source
from attar.recipe import DEFAULT_RECIPE, Recipe, changed_settings, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_published_recipes(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.summary.endswith(".")
    file = tmp_path / "copy.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(str(file)) == load_recipe(file) == load_recipe(recipe) == recipe
    assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_a_shown_recipe_explains_its_keys():
    lines = load_recipe("s2q-vdit").to_yaml().splitlines()
    (line,) = [line for line in lines if line.startswith("  features:")]
    assert line == "  features: latent  # what C_quant is computed on"


def test_the_papers_settings():
    recipe = load_recipe("s2q-vdit")
    assert (recipe.trace.prompts, recipe.select.count, recipe.select.policy) == (10, 40, "salient")
    assert (recipe.reconstruct.epochs, recipe.reconstruct.batch_size) == (15, 1)
    assert (recipe.reconstruct.transform_lr, recipe.reconstruct.clip_lr) == (5e-3, 5e-2)
    assert (recipe.reconstruct.lambda_min, recipe.reconstruct.lambda_max) == (0.5, 1.0)
    assert recipe.rounding.method == "gptq" and recipe.bits == "W4A6"
    assert (recipe.select.neighbour, recipe.select.normalise) == ("next", "min_max")
    assert (recipe.quantize.clip_start, recipe.quantize.stats_ema) == (4.0, None)
    assert recipe.reconstruct.lambda_over == "joint"
    assert DEFAULT_RECIPE in recipe_names()


def test_which_recipes_need_data():
    needs = {name: load_recipe(name).needs_data for name in recipe_names()}
    assert not needs["rtn"] and not needs["hadamard"] and needs["smoothquant"] and needs["s2q-vdit"]
    assert load_recipe("rtn", {"rounding.method": "gptq", "trace": {}, "select": {}}).needs_data
    with pytest.raises(AttarError, match="no trace or select stage"):
        load_recipe("rtn", {"rounding.method": "gptq"})


def test_overrides():
    recipe = load_recipe("s2q-vdit", {"quantize.weights": 3, "reconstruct": None, "select.count": 7})
    assert recipe.quantize.weights == 3 and recipe.reconstruct is None and recipe.select.count == 7
    assert load_recipe("rtn", {"reconstruct.epochs": 3, "trace": {}, "select": {}}).reconstruct.epochs == 3
    original = load_recipe("s2q-vdit")
    load_recipe(original, {"quantize.weights": 3})
    assert original.quantize.weights == 4
    mapping = {"name": "mine", "quantize": {"weights": 5}}
    assert load_recipe(mapping, {"quantize.acts": 8}).bits == "W5A8"
    assert mapping == {"name": "mine", "quantize": {"weights": 5}}


def test_recipes_are_frozen():
    with pytest.raises(ValidationError):
        load_recipe("rtn").name = "other"


@pytest.mark.parametrize("bits", [0, 1, 9, -4, 16, 4.5, "x", None, True, []])
def test_impossible_weights(bits):
    with pytest.raises(AttarError, match=r"quantize\.weights"):
        load_recipe("s2q-vdit", {"quantize.weights": bits})


@pytest.mark.parametrize("bits", [0, 1, 9, 17, "x", None])
def test_impossible_activations(bits):
    with pytest.raises(AttarError, match=r"quantize\.acts"):
        load_recipe("s2q-vdit", {"quantize.acts": bits})


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_possible_bits(bits):
    assert (
        load_recipe("s2q-vdit", {"quantize.weights": bits, "quantize.acts": bits}).bits == f"W{bits}A{bits}"
    )
    assert load_recipe("s2q-vdit", {"quantize.acts": 16}).bits == "W4A16"


# ----------------------------------------------------------------------------------------------- prompts


def test_where_calibration_prompts_come_from():
    recipe = load_recipe("s2q-vdit", {"trace.prompts": 2})
    own = Source("model", prompts=["one", "two", "three"])
    assert calibration_prompts(recipe, own, None) == ["one", "two"]
    assert calibration_prompts(recipe, own, ["a", "b", "c", "d"]) == ["a", "b", "c", "d"]
    assert calibration_prompts(recipe, Source("model"), None) == list(GENERAL_PROMPTS[:2])
    assert calibration_prompts(load_recipe("rtn"), own, ["a"]) == []
    with pytest.raises(AttarError, match="the recipe traces 4 prompts, the model brings 3"):
        calibration_prompts(load_recipe("s2q-vdit", {"trace.prompts": 4}), own, None)
    assert len(set(GENERAL_PROMPTS)) == len(GENERAL_PROMPTS) >= Recipe(name="x").trace.prompts


def test_changed_settings_are_those_of_the_method():
    changes = {"quantize.roles": {"ffn.down": {"weights": 8}}, "reconstruct.epochs": 3, "quantize.weights": 3}
    changed = changed_settings(load_recipe("s2q-vdit", {**changes, "text_encoder.weights": 8}))
    assert changed == {"reconstruct.epochs": (3, 15), "quantize.roles.ffn.down.weights": (8, None)}
    described = {**load_recipe("rtn").model_dump(), "summary": "other words"}
    assert changed_settings(load_recipe(described)) == {}
    assert (
        changed_settings(load_recipe({**described, "name": "mine"}, {"quantize.rotation": "hadamard"})) == {}
    )


def test_a_budget_that_leaves_no_choice_is_none():
    assert load_recipe("attar", {"quantize.weights": 8, "quantize.acts": 8}).allocate is None
    assert load_recipe("attar", {"quantize.weights": 8, "allocate.acts": False}).allocate is None
    assert load_recipe(
        "attar", {"quantize.weights": 8, "quantize.acts": 6, "allocate.acts": True}
    ).chooses_acts
    narrow = load_recipe("attar", {"quantize.acts": 5, "allocate.acts": True, "allocate.act_bits": [6, 4]})
    assert narrow.chooses_acts and narrow.allocate is not None and narrow.allocate.act_widths == [4, 6]
    with pytest.raises(AttarError, match="different widths from 2 to 8"):
        load_recipe("attar", {"allocate.act_bits": [4, 4]})
    assert [b for b in (2, 3, 4, 5, 6, 7, 8, 16) if load_recipe("attar", {"quantize.acts": b}).chooses_acts] == [
        4, 5, 6, 7
    ]  # fmt: skip
    assert load_recipe("attar", {"quantize.weights": 8, "quantize.acts": 16}).allocate is None
    assert not load_recipe("attar", {"quantize.act_format": "fp8", "quantize.acts": 8}).chooses_acts
    assert not load_recipe("attar", {"quantize.step_groups": 2, "quantize.acts": [8, 6]}).chooses_acts
    assert load_recipe("attar", {"quantize.weights": 8, "allocate.bits": [2, 4]}).allocate is not None
    assert load_recipe("attar", {"quantize.weights": 6}).allocate is not None
    assert load_recipe("rtn", {"allocate.budget": "8bits"}).allocate is None
    lloyd = load_recipe("attar", {"quantize.weight_format": "lloyd"})
    assert lloyd.widths == [2, 3, 4, 5]
    with pytest.raises(AttarError, match="none of the budget's bits"):
        load_recipe("attar", {"quantize.weight_format": "binary", "quantize.weights": 1})


def test_changed_settings_name_both_values_of_a_default():
    changed = changed_settings(
        load_recipe("attar", {"quantize.clip_search": False, "rounding.order": "given"})
    )
    assert changed == {"quantize.clip_search": (False, True), "rounding.order": ("given", "activation")}


def test_a_branch_for_few_bits_of_activations_is_there_with_few_bits_alone():
    def branch(acts, **changes):
        return load_recipe("attar", {"quantize.acts": acts, **changes}).quantize.branch

    assert branch(4).rank == 8 and branch(3) == branch([4, 3], **{"quantize.step_groups": 2})
    assert branch(5) is None and branch(16) is None
    assert branch([5, 3], **{"quantize.step_groups": 2}) is None
    assert branch(8, **{"quantize.low_rank.acts": None}).rank == 8
    assert load_recipe("svdquant", {"quantize.acts": 8}).quantize.branch.rank == 32
