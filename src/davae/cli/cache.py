"""``davae cache``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import new_folder
from davae.training.run_cache import default_folder, run_cache, run_verify


class ShardFormat(StrEnum):
    """Kinds of shards."""

    safetensors = "safetensors"
    webdataset = "webdataset"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(cache)


def cache(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides as section.key=value, e.g. data.path=photos/")
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", help="A recipe's name, or a YAML file.")] = "tiny",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder; an unfinished cache goes on (default: the recipe's data.cache, else caches/RECIPE).",
            callback=new_folder,
        ),
    ] = None,
    autoencoder: Annotated[
        Path | None,
        typer.Option("--autoencoder", help="Folder of the trained autoencoder (default: stage 1's result)."),
    ] = None,
    shard_format: Annotated[
        ShardFormat, typer.Option("--format", help="safetensors files, or tar files for WebDataset.")
    ] = ShardFormat.safetensors,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images encoded together.")] = 8,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only compare the shards in --out with their hashes.")
    ] = False,
) -> None:
    """Latents and text embeddings of a recipe's images, for `davae train diffusion` to train from."""
    if verify:
        typer.echo(run_verify(out or default_folder(recipe, overrides or ())))
        return
    text = run_cache(recipe, overrides or (), out, autoencoder, shard_format.value, batch_size)
    if text:
        typer.echo(text)
