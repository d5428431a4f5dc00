"""``davae plan``."""

from typing import Annotated

import typer

from davae.cli.options import Json, check_recipe, write_figures


def plan(
    base: Annotated[str, typer.Argument(help="A name on the hub, a pipeline folder, a preset, or 'tiny'.")],
    resolution: Annotated[int, typer.Option(min=1, help="Side of the full-resolution image in pixels.")] = 1024,
    scale: Annotated[int, typer.Option(min=1, help="Ratio of full to base resolution: 2, 4 or 8.")] = 2,
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
    json_file: Json = None,
) -> None:
    """Estimate tokens, FLOPs, memory, speed-up and training hours of an upgrade, without training."""
    if recipe is not None:
        check_recipe(recipe, (), images=False)
    from davae.planner.recipes import plan_upgrade

    made = plan_upgrade(
        base,
        resolution=resolution,
        scale=scale,
        detail_channels=tuple(detail_channels) if detail_channels else None,
        gpu=gpu,
        batch=batch,
        recipe=recipe,
    )
    write_figures(json_file, made.to_json())
    from davae.cli.tables import print_plan

    print_plan(made)
