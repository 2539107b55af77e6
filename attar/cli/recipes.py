"""The recipes that exist: attar recipes, attar recipes show."""

from __future__ import annotations

from typing import Annotated

import typer

from attar.cli.app import app
from attar.cli.options import Json, assignments, emit

recipes_app = typer.Typer(help="List the recipes, or show one.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback()
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """List the recipes; `attar recipes show NAME` prints one with every setting."""
    if context.invoked_subcommand is not None:
        return
    from attar.recipe import DEFAULT_RECIPE, load_recipe, recipe_names

    rows = [load_recipe(name) for name in recipe_names()]
    if as_json:
        emit(
            [{"name": r.name, "summary": r.summary, "paper": r.paper.url if r.paper else None} for r in rows]
        )
        return
    for r in rows:
        mark = " (default)" if r.name == DEFAULT_RECIPE else ""
        print(
            f"{r.name}{mark}\n    {r.summary}" + (f"\n    {r.paper.title}, {r.paper.url}" if r.paper else "")
        )


@recipes_app.command()
def show(
    name: Annotated[str, typer.Argument(help="published name or YAML file")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="override, e.g. quantize.weights=3")] = None,
    as_json: Json = False,
) -> None:
    """Print a recipe in resolved form: every key with its value."""
    import yaml

    from attar.recipe import load_recipe

    text = load_recipe(name, assignments(set_)).to_yaml()
    emit(yaml.safe_load(text)) if as_json else print(text, end="")
