"""``davae ablate``: the method with and without each of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from davae.cli.options import new_folder
from davae.cli.output import wide_console
from davae.errors import DavaeError
from davae.report.ablation import draw_ablation, shown_metrics
from davae.report.words import significant
from davae.training.ablation import Ablation, ablate
from davae.training.ablation_settings import AblationRecipe
from davae.training.recipe import dump_recipe, load_recipe


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
    shown = shown_metrics(result)
    for label in shown.values():
        table.add_column(label, justify="right")
    for name, figures in result.variants.items():
        spreads = (figures[metric] for metric in shown)
        table.add_row(name, *(f"{significant(s.mean, 4)} ({significant(s.std, 2)})" for s in spreads))
    table.add_row("real images", *(significant(result.real[m], 4) if m in result.real else "" for m in shown))
    return table
