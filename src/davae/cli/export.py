"""``davae export``."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import folder_of
from davae.runtime.console import say


def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the result; must not hold files.", callback=folder_of("result"))
    ],
    license: Annotated[
        str | None,
        typer.Option(help="The result's licence, by the hub's id or by its name; default: the base's, from its card."),
    ] = None,
    license_name: Annotated[
        str | None, typer.Option(help="What a licence is called that the hub has no id for.")
    ] = None,
    license_link: Annotated[str | None, typer.Option(help="Where that licence is written.")] = None,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="LoRA and widened layers in place of the merged pipeline.")
    ] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Publish the folder as user/name on the hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
) -> None:
    """Copy a run's result to a folder with a model card, for others to open; publish it if asked."""
    from davae.training.runs.export import export_run

    message = export_run(
        run,
        out,
        license=license,
        license_name=license_name,
        license_link=license_link,
        adapters=adapters,
        repo_id=push_to_hub,
        private=private or None,
    )
    say(message)
