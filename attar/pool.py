"""Whether the traced steps can give what a recipe takes from them.

It is asked before anything is generated, and once more when it is known in which steps each component runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attar import ranks
from attar.calibration.select import ScoreTable, select
from attar.calibration.store import TraceStore
from attar.errors import AttarError
from attar.quantize.relations import rows_of_each, windows
from attar.recipe import Recipe
from attar.runtime.step_groups import StepGroups
from attar.samples import traced_groups


def check_pool(recipe: Recipe, prompts: Sequence[str], steps: int, seed: int = 0) -> None:
    """Raises AttarError before anything is generated if the pool cannot hold the samples, windows or groups of steps
    that are asked for, or samples are fewer than the processes.

    steps: of a traced prompt.
    """
    needed = recipe.needs_data and recipe.trace is not None and recipe.select is not None
    for where, count in (
        ("allocate.samples", None if recipe.allocate is None else recipe.allocate.samples),
        ("synthesize.count", None if recipe.synthesize is None else recipe.synthesize.count),
        ("select.count", recipe.select.count if needed and recipe.select is not None else None),
    ):
        if count is not None and count < ranks.size():
            raise AttarError(
                f"{ranks.size()} processes cannot share {where} = {count} calibration samples",
                where=where,
                fix="Start fewer processes, or ask for more samples",
            )
    if recipe.traced is None:
        return
    if needed and recipe.select is not None and len(prompts) * steps < recipe.select.count:
        raise AttarError(
            f"{len(prompts)} prompts of {steps} steps give fewer candidates than select.count = {recipe.select.count}",
            where="select.count",
            fix="Ask for fewer samples, or trace more prompts or steps",
        )
    _check(recipe, [range(steps)] * len(prompts), seed)
    if recipe.quantize.step_groups > 1:
        StepGroups.of_trajectory(range(steps), recipe.quantize.step_groups)


def check_frames(recipe: Recipe, videos: bool) -> None:
    """Raises AttarError before anything is generated if frames are to be compared or told apart, and the pipeline makes
    images."""
    if videos or not recipe.needs_data:
        return
    learned, branch = recipe.reconstruct, recipe.quantize.branch
    if learned is not None and learned.epochs and learned.temporal_weight:
        raise AttarError(
            "a temporal loss compares frames, and the model makes images",
            where="reconstruct.temporal_weight",
            fix="Set it to 0",
        )
    if branch is not None and branch.gate != "none":
        raise AttarError(
            "images are no video, whose frames a gate tells apart", where="quantize.low_rank.gate",
            fix="Set it to none",
        )  # fmt: skip


def check_traced(
    recipe: Recipe, store: TraceStore, components: Iterable[str], prompts: int, seed: int
) -> None:
    """The same of what was traced, for every component: of two experts, one may run in a few steps only."""
    if recipe.traced is None:
        return
    for name in components:
        ran = [store.steps_of(name, p) for p in range(prompts)]
        if not any(ran):
            raise AttarError("the component did not run in any traced step", where=name)
        if recipe.quantize.step_groups > 1:
            traced_groups(store, name, prompts, recipe.quantize.step_groups)
        try:
            _check(recipe, ran, seed)
        except AttarError as error:
            where = ": ".join(filter(None, (name, error.where)))
            raise AttarError(error.what, where=where, fix=error.fix) from error


def _check(recipe: Recipe, ran: Sequence[Sequence[int]], seed: int) -> None:
    """ran: the steps of every prompt in which a component runs."""
    places = [(prompt, step) for prompt, steps in enumerate(ran) for step in steps]
    chosen, whole = recipe.select, recipe.finetune
    if chosen is not None and recipe.needs_data and (whole is None or recipe.polishes):
        equal = [1.0] * len(places)
        table = ScoreTable([p for p, _ in places], [s for _, s in places], equal, equal, equal)
        # with both caps the scores decide how many there are, so each is tried alone
        for caps in ({"cap_per_prompt": chosen.cap_per_prompt}, {"cap_per_step": chosen.cap_per_step}):
            select(chosen.policy, table, chosen.count, seed, **caps)
    if whole is not None and whole.relation is not None:
        windows(places, whole.relation.window)
        if whole.relation.memory:
            rows_of_each(whole.relation.memory, len(places))
