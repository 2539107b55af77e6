"""The default recipe: branches where activations have few bits, the same in all that is measured, and their gain."""

import pytest

from attar.candidates import act_options, plan_options
from attar.errors import AttarError
from attar.planning import plan_components
from attar.recipe import load_recipe
from tests.support import tiny

RANK = 2  # tiny layers are 32 wide, of which a branch may have an eighth


def recipe(acts, **changes):
    return load_recipe("attar", {"quantize.acts": acts, "quantize.low_rank.rank": RANK, **changes})


def ranks(plans):
    return {plan.name: plan.low_rank for plan in plans["transformer"] if not plan.skipped}


def test_whatever_a_layer_may_get_its_branch_is_that_of_the_recipes_own_bits():
    """Else bits would be chosen by the errors of other layers than those that are made."""
    components = {"transformer": tiny.wan()}
    few = ranks(plan_components(components, recipe(4, allocate=None)))
    assert set(few.values()) == {RANK}
    options = {**plan_options(components, recipe(4)), **act_options(components, recipe(4))}
    assert {3, 4, 5, 6, 8} <= set(options) and all(ranks(plans) == few for plans in options.values())
    for plans in act_options(components, recipe(6)).values():
        assert not any(ranks(plans).values())


def test_what_needs_a_branch_is_refused_where_the_bits_call_for_none():
    assert recipe(4, **{"reconstruct.train_branch": True}).quantize.branch.rank == RANK
    with pytest.raises(AttarError, match="train_branch needs a branch"):
        recipe(6, **{"reconstruct.train_branch": True})
    adapters = {
        "select": None, "reconstruct": None, "rounding.method": "nearest", "allocate": None,
        "finetune": {"adapter_rank": 4, "adapter_start": "error", "weight_lr": 0},
    }  # fmt: skip
    assert recipe(6, **adapters).finetune.adapter_rank == 4
    with pytest.raises(AttarError, match="a branch"):
        recipe(4, **adapters)
