"""``davae demo``."""

from pathlib import Path
from typing import Annotated

import typer

from davae.choices import LAST_SEED
from davae.cli.options import check_recipe, folder_of, some_images
from davae.runtime.console import say, shown


def demo(
    out: Annotated[Path, typer.Option(help="Run directory.", callback=folder_of("demo"))] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of training and samples.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Only a few steps, to see whether it works.")] = False,
    data: Annotated[
        str | None,
        typer.Option(help="A folder or data set of images to use instead of procedural scenes.", callback=some_images),
    ] = None,
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a YAML file.")] = "tiny",
) -> None:
    """Run the whole method on the embedded base: both stages, samples, report. No download, no GPU needed."""
    check_recipe(recipe, (), images=data is None)
    from davae.demo import run_demo

    report = run_demo(out, seed=seed, quick=quick, data=data, recipe=recipe)
    from davae.cli.tables import print_demo
    from davae.runtime.text_files import read_object

    print_demo(read_object(report.parent / "summary.json"))
    say(f"report: {shown(report)}")
