"""``davae ablate``: the method with and without each of its parts."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import folder_of
from davae.runtime.console import say, wide_console


def ablate(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides as key=value, e.g. seeds=[0], or of every variant, data.path=photos/"),
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", help="An ablation's name, or a YAML file.")] = "ablation-tiny",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder (default runs/RECIPE).", callback=folder_of("ablation"))
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved file and exit.")] = False,
) -> None:
    """Train every variant with every seed and compare them; the same command continues an interrupted ablation."""
    from davae.recipes.read import dump_recipe, load_ablation

    settings = load_ablation(recipe, overrides or ())
    if dry_run:
        say(dump_recipe(settings))
        return
    from davae.report.ablation import ablation_table, run_ablation

    folder = out or Path("runs") / Path(recipe).stem
    result = run_ablation(settings, folder)
    wide_console().print(ablation_table(result))
    say(folder / "ablation.json", folder / "ablation.png")
