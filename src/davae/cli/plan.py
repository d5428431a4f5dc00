"""``davae plan``."""

from typing import Annotated

import typer

from davae.cli.options import Json, base_and_overrides, check_recipe, write_figures


def plan(
    base: Annotated[
        list[str] | None,
        typer.Argument(
            help="A name on the hub, a pipeline folder, a preset, or 'tiny' (default: the recipe's); "
            "with --recipe also section.key=value."
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the full-resolution image in pixels (default: the recipe's, else 1024)."),
    ] = None,
    scale: Annotated[
        int | None,
        typer.Option(min=1, help="Ratio of full to base resolution: 2, 4 or 8 (default: the recipe's, else 2)."),
    ] = None,
    detail_channels: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Detail channels; repeat it for levels (default: as in the official code)."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="H100, H200, A100, 4090, ...")] = "H100",
    batch: Annotated[int, typer.Option(min=1, help="Images at a time when sampling.")] = 1,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe whose steps and batch sizes to use (default: the bundled one for this upgrade)."),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Memory of a training without a GPU.")] = False,
    json_file: Json = None,
) -> None:
    """Estimate tokens, FLOPs, memory, speed-up and training hours of an upgrade, without training."""
    name, overrides = base_and_overrides(base)
    if recipe is not None:
        check_recipe(recipe, overrides, images=False)
    from davae.planner.recipes import plan_upgrade

    made = plan_upgrade(
        name,
        resolution=resolution,
        scale=scale,
        detail_channels=tuple(detail_channels) if detail_channels else None,
        gpu=gpu,
        batch=batch,
        recipe=recipe,
        overrides=overrides,
        cpu=cpu,
    )
    write_figures(json_file, made.to_json())
    from davae.cli.tables import print_plan

    print_plan(made)
