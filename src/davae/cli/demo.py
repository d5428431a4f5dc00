"""``davae demo``."""

from pathlib import Path
from typing import Annotated

import typer

from davae.choices import LAST_SEED
from davae.cli.options import Overrides, Upscalers, check_recipe, folder_of, some_images, upscalers_of
from davae.runtime.console import say, shown


def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Run directory.", callback=folder_of("demo"))] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of training and samples.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Only a few steps, to see whether it works.")] = False,
    data: Annotated[
        str | None,
        typer.Option(help="A folder or data set of images to use instead of procedural scenes.", callback=some_images),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="An autoencoder or a pipeline, a folder or a name on the hub: stage 1 over it on --data."),
    ] = None,
    upscaler: Upscalers = None,
    recipe: Annotated[
        str | None, typer.Option(help="A recipe's name, or a YAML file (default: tiny; with --base taesd3-photos).")
    ] = None,
) -> None:
    """Run the whole method on the embedded base: both stages, samples, report. No download, no GPU needed."""
    from davae.recipes.read import demo_recipe

    upscalers = upscalers_of(upscaler)
    check_recipe(recipe or demo_recipe(base), overrides, images=data is None and base is None)
    from davae.demo import run_demo

    report = run_demo(
        out,
        seed=seed,
        quick=quick,
        data=data,
        base=base,
        recipe=recipe,
        upscalers=upscalers,
        overrides=overrides or (),
    )
    from davae.cli.tables import print_demo
    from davae.report import Summary

    print_demo(Summary.read(report.parent))
    say(f"report: {shown(report)}")
