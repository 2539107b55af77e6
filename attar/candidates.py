"""What every layer may become under a budget, and a choice for forecasts, before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from attar.budget.amount import Budget
from attar.budget.choice import Candidate, Layer, choose_bits, choose_within
from attar.budget.sensitivity import Sensitivity
from attar.errors import AttarError
from attar.planning import Plans, plan_components, with_act_widths, with_overrides, with_widths
from attar.recipe import Recipe
from attar.settings import layer_size

Bits = dict[str, dict[str, int]]  # component -> layer -> bits
ActBits = dict[str, dict[str, int | list[int]]]  # the same, or bits of each group of steps where they differ


def plan_options(components: Mapping[str, nn.Module], recipe: Recipe) -> dict[int, Plans]:
    """The plans of all components at every width that the budget may choose, and at the recipe's own.

    A layer whose bits the recipe names has them in all of these, and needs no rule of its own.
    """
    assert recipe.allocate is not None
    widths = sorted({*recipe.widths, recipe.quantize.weights})
    return {bits: plan_components(components, with_widths(recipe, bits)) for bits in widths}


def act_options(components: Mapping[str, nn.Module], recipe: Recipe) -> dict[int, Plans]:
    """The same for the activations; {} where these have the recipe's bits in every layer."""
    assert recipe.allocate is not None
    if not recipe.chooses_acts:
        return {}
    widths = sorted({*recipe.allocate.act_widths, recipe.mean_acts})
    return {bits: plan_components(components, with_act_widths(recipe, bits)) for bits in widths}


def layers_of(
    options: Mapping[int, Plans], measured: Mapping[str, Sensitivity], recipe: Recipe
) -> list[Layer]:
    """Every quantized layer with what it may get. Layers outside the blocks cost bytes and cause no error here."""
    assert recipe.allocate is not None
    found = []
    for component in options[recipe.quantize.weights]:
        for row in zip(*(plans[component] for plans in options.values()), strict=True):
            if row[0].skipped:
                continue
            errors = measured[component].get(row[0].name, {})
            at = {}  # one alone for a layer whose bits the recipe names
            for p in row:
                at[p.weight_bits] = Candidate(
                    p.weight_bits, layer_size(p, recipe).packed, errors.get(p.weight_bits, 0.0)
                )
            asked = dict(zip(options, row, strict=True))
            allowed = {asked[bits].weight_bits for bits in recipe.widths}
            own = at[asked[recipe.quantize.weights].weight_bits]
            dense, count = layer_size(row[0], recipe).dense, row[0].in_features * row[0].out_features
            candidates = tuple(c for b, c in sorted(at.items()) if b in allowed)
            found.append(Layer(f"{component}.{row[0].name}", count, dense, own, candidates))
    return found


def act_layers_of(
    options: Mapping[int, Plans],
    measured: Mapping[str, Sequence[Sensitivity]],
    multiplications: Mapping[str, Mapping[str, int]],
    steps: Mapping[str, Sequence[int]],
    recipe: Recipe,
) -> list[Layer]:
    """Every layer whose activations are quantized, with what they may get, once for each group of steps. They cost
    multiplications and no bytes, so these stand where a weight's layer has its weights.

    measured: component -> group -> what errors in the steps of that group come to. steps: component -> how many each
    group has, by which its multiplications count.
    """
    assert recipe.allocate is not None
    found = []
    for component in next(iter(options.values()), {}):
        for row in zip(*(plans[component] for plans in options.values()), strict=True):
            name = row[0].name
            if row[0].skipped or row[0].act_bits is None or name not in measured[component][0]:
                continue
            for group, (errors, count) in enumerate(zip(measured[component], steps[component], strict=True)):
                asked = {}
                for bits, p in zip(options, row, strict=True):
                    chosen = p.act_bits if p.act_groups is None else p.act_groups[group]
                    asked[bits] = Candidate(chosen or 0, 0, errors[name][p.act_bits or 0])
                # one alone for a layer whose bits the recipe names
                at = {asked[bits].bits: asked[bits] for bits in recipe.allocate.act_widths}
                weight, own = multiplications[component][name] * count, asked[recipe.mean_acts]
                found.append(Layer(f"{component}.{name}", weight, 0, own, tuple(at[b] for b in sorted(at))))
    return found


def choose(layers: Sequence[Layer], budget: Budget, own: int) -> list[Candidate]:
    """One candidate for each layer under the budget of a recipe with `own` bits. AttarError where none keeps to it.

    The budget "same" is the mean of the layers that there is a choice for, as those whose bits the recipe names would
    have these in any case.
    """
    free = [layer for layer in layers if len(layer.candidates) > 1 or budget.kind != "same"]
    taken = choose_bits(free, budget.at(own)) if free else []
    chosen = {id(layer): candidate for layer, candidate in zip(free, taken, strict=True)}
    return [chosen.get(id(layer), layer.candidates[0]) for layer in layers]


def choose_inside(
    layers: Sequence[Layer],
    taken: Sequence[Candidate],
    seen: Sequence[Layer],
    groups: Mapping[str, str],
    budget: Budget,
) -> list[Candidate]:
    """Candidates of `layers` that cost every group what those `taken` do, chosen by the errors that the group's metric
    sees. seen: the same layers with these errors. groups: layer -> group; layers outside the blocks are in none, and
    keep what they have.
    """
    inside = choose_within(seen, [groups.get(layer.name, "") for layer in layers], taken, budget)
    at = [{c.bits: c for c in layer.candidates} for layer in layers]
    return [own[c.bits] for own, c in zip(at, inside, strict=True)]


def bits_of(options: Mapping[int, Plans], layers: Sequence[Layer], taken: Sequence[Candidate]) -> Bits:
    """The bits of the layers that there was a choice for."""
    free = {a.name: c.bits for a, c in zip(layers, taken, strict=True) if len(a.candidates) > 1}
    return {
        name: {p.name: free[f"{name}.{p.name}"] for p in plans if f"{name}.{p.name}" in free}
        for name, plans in next(iter(options.values()), {}).items()
    }


def act_bits_of(options: Mapping[int, Plans], layers: Sequence[Layer], taken: Sequence[Candidate]) -> ActBits:
    """The same for activations: a list where groups of steps differ."""
    free: dict[str, list[int]] = {}
    for layer, candidate in zip(layers, taken, strict=True):  # groups in their order
        if len(layer.candidates) > 1:
            free.setdefault(layer.name, []).append(candidate.bits)
    return {
        name: {
            p.name: found if len(set(found)) > 1 else found[0]
            for p in plans
            if (found := free.get(f"{name}.{p.name}"))
        }
        for name, plans in next(iter(options.values()), {}).items()
    }


def chosen_options(
    bits: Mapping[str, Mapping[str, int]], acts: Mapping[str, Mapping[str, int | list[int]]]
) -> dict[str, dict[str, dict[str, int | list[int]]]]:
    """Component -> layer -> {weights, acts}, what was chosen of them."""
    found: dict[str, dict[str, dict[str, int | list[int]]]] = {name: {} for name in bits}
    for key, chosen in (("weights", bits), ("acts", acts)):
        for component, named in chosen.items():
            for name, b in named.items():
                found.setdefault(component, {}).setdefault(name, {})[key] = b
    return found


def with_bits(recipe: Recipe, bits: Bits, acts: ActBits | None = None) -> Recipe:
    """The recipe with these bits of weights and activations in the place of its budget."""
    layers = {
        f"{component}.{name}": options
        for component, named in chosen_options(bits, acts or {}).items()
        for name, options in named.items()
    }
    return with_overrides(recipe, layers)


def in_every_layer(recipe: Recipe) -> Recipe:
    """The recipe with its own bits in every layer that it names none for, in the place of a budget of as many on
    average. A recipe without a budget comes back as it is. Raises AttarError for any other budget."""
    if recipe.allocate is None:
        return recipe
    budget = Budget.parse(recipe.allocate.budget)
    if budget.at(recipe.quantize.weights) != Budget("bits", float(recipe.quantize.weights)):
        raise AttarError(
            f"the budget {budget} gives each layer other bits, which are not known yet",
            where="allocate.budget",
            fix="Name bits for every layer with --weights, and leave the budget out",
        )
    return with_widths(recipe, recipe.quantize.weights)


def presume(components: Mapping[str, nn.Module], recipe: Recipe) -> tuple[Recipe, dict[str, set[str]]]:
    """The recipe with bits that keep to its budget as if all weights were equally sensitive, and the layers of each
    component whose bits, of weights or of activations, are yet to be chosen.

    For forecasts, which know sizes and speeds by it and not which layer gets what. Rounding a weight to b bits is taken
    to cost 4^-b, so a budget of as many mean bits as the recipe has gives every layer these. A recipe without a budget
    comes back as it is. Raises AttarError where no choice keeps to the budget.
    """
    if recipe.allocate is None:
        return recipe, {}
    options = plan_options(components, recipe)
    equal: dict[str, Sensitivity] = {name: {} for name in components}
    for plans in options.values():
        for name, part in plans.items():
            for p in part:
                if p.weight_bits is not None:
                    cost = p.in_features * p.out_features * 4.0**-p.weight_bits
                    equal[name].setdefault(p.name, {})[p.weight_bits] = cost
    layers = layers_of(options, equal, recipe)
    taken = choose(layers, Budget.parse(recipe.allocate.budget), recipe.quantize.weights)
    bits = bits_of(options, layers, taken)
    free = {name: set(named) for name, named in bits.items()}
    acts = list(act_options(components, recipe).values())
    for name, named in free.items():
        rows = zip(*(plans[name] for plans in acts), strict=True)
        named |= {row[0].name for row in rows if len({p.act_bits for p in row}) > 1}
    return with_bits(recipe, bits), free


def check_budget(components: Mapping[str, nn.Module], recipe: Recipe) -> None:
    """Raises AttarError for a budget of size or mean bits that no choice keeps to, before anything is measured."""
    if recipe.allocate is not None and Budget.parse(recipe.allocate.budget).kind != "loss":
        presume(components, recipe)
