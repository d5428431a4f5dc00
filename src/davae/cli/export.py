"""``davae export``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.cli.options import folder_of
from davae.runtime.console import say

Format = Literal["diffusers", "comfyui"]


def export(
    run: Annotated[Path, typer.Argument(help="A run directory, or the folder of an upgraded pipeline.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the result; must not hold files.", callback=folder_of("result"))
    ],
    license: Annotated[
        str | None,
        typer.Option(help="The result's licence, by hub id or by name (default: the base's, from its card)."),
    ] = None,
    license_name: Annotated[str | None, typer.Option(help="Name of a licence that the hub has no id for.")] = None,
    license_link: Annotated[str | None, typer.Option(help="Link to that licence.")] = None,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="LoRA, widened layers and autoencoder instead of the merged pipeline.")
    ] = False,
    format: Annotated[
        Format,
        typer.Option(help="'comfyui': single files, in folders named as those of its models: see docs/comfyui.md."),
    ] = "diffusers",
    push_to_hub: Annotated[str | None, typer.Option(help="Publish the folder as user/name on the hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Copy a run's result to a folder with a model card, to be shared; with --push-to-hub, publish it."""
    from davae.training.runs.export import export_run

    message = export_run(
        run,
        out,
        license=license,
        license_name=license_name,
        license_link=license_link,
        adapters=adapters,
        format=format,
        repo_id=push_to_hub,
        private=private or None,
    )
    say(message)
