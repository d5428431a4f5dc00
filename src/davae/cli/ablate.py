"""``davae ablate``: the method with and without each of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from davae.cli.options import new_folder
from davae.cli.output import wide_console
from davae.errors import DavaeError
from davae.recipes.read import dump_recipe, load_recipe
from davae.recipes.settings import AblationRecipe
from davae.report.ablation import SHOWN, draw_ablation
from davae.training.ablation import Ablation, ablate


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("ablate")(_ablate)


def _ablate(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides as key=value, e.g. seeds=[0]")
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="An ablation's name, or a YAML file.")
    ] = "ablation-tiny",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder (default runs/RECIPE).", callback=new_folder)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved file, then leave.")] = False,
) -> None:
    """Train every variant with every seed and compare them; the same command continues."""
    settings = load_recipe(recipe, overrides or ())
    if not isinstance(settings, AblationRecipe):
        raise DavaeError(f"recipe '{recipe}' is of kind '{settings.kind}', not an ablation")
    if dry_run:
        typer.echo(dump_recipe(settings))
        return
    folder = out or Path("runs") / Path(recipe).stem
    result = ablate(settings, folder)
    picture = draw_ablation(result, folder / "ablation.png")
    wide_console().print(ablation_table(result))
    typer.echo(f"{folder / 'ablation.json'}\n{picture}")


def ablation_table(result: Ablation) -> Table:
    """Mean and spread of the shown metrics, a row a variant."""
    seeds = f"{len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}, {result.samples} samples each"
    table = Table(title=f"mean (standard deviation) over {seeds}")
    table.add_column("variant")
    shown = [m for m in SHOWN if all(m in v for v in result.variants.values())]
    for metric in shown:
        table.add_column(SHOWN[metric], justify="right")
    for name, figures in result.variants.items():
        table.add_row(name, *(f"{figures[m].mean:.3f} ({figures[m].std:.3f})" for m in shown))
    table.add_row("real images", *(f"{result.real[m]:.3f}" if m in result.real else "" for m in shown))
    return table
