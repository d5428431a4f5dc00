"""``davae recipes list | show | copy | new``."""

from pathlib import Path
from typing import Annotated

import typer

from davae.runtime.console import say

app = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A recipe that comes with davae.")]


@app.command("list")
def list_() -> None:
    """List the recipes that come with davae."""
    from davae.recipes.read import recipe_table

    say(recipe_table())


@app.command()
def show(name: Name) -> None:
    """Print a recipe with its comments; `davae train ... --dry-run` prints it with all defaults."""
    from davae.recipes.read import recipe_text

    say(recipe_text(name).rstrip())


@app.command()
def copy(
    name: Name,
    file: Annotated[Path | None, typer.Argument(help="New file (default: NAME.yaml).")] = None,
) -> None:
    """Copy a recipe to a file of your own."""
    from davae.recipes.read import recipe_text, write_recipe

    say(write_recipe(recipe_text(name), file or Path(name)))


@app.command()
def new(
    pipeline: Annotated[str, typer.Argument(help="A pipeline's folder, a name on the hub, or a preset.")],
    file: Annotated[Path, typer.Argument(help="New file.")] = Path("mine.yaml"),
    data: Annotated[str, typer.Option(help="Images: a folder, or a data set's name.")] = "images",
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side of the images in pixels (default: the pipeline's times the scale).")
    ] = None,
    scale: Annotated[int, typer.Option(min=2, help="Ratio of full to base resolution: 2, 4 or 8.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Of each stage; schedules follow it.")] = 20_000,
) -> None:
    """Write a recipe for a pipeline of your own, with what it is expected to take."""
    from davae.planner.recipes import new_recipe
    from davae.recipes.read import write_recipe

    say(write_recipe(new_recipe(pipeline, data=data, resolution=resolution, scale=scale, steps=steps), file))
