"""``davae cache``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.cli.options import Overrides, RecipeName, TrainedAutoencoder, check_recipe, folder_of
from davae.runtime.console import say

ShardFormat = Literal["safetensors", "webdataset"]


def _new_unless_verified(context: typer.Context, folder: Path | None) -> Path | None:
    """With ``--verify`` the folder is only read, and need not be writable."""
    return folder if context.params.get("verify") else folder_of("cache")(folder)


def cache(
    overrides: Overrides = None,
    recipe: RecipeName = "tiny",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder; an unfinished cache is continued (default: the recipe's data.cache, else caches/RECIPE).",
            callback=_new_unless_verified,
        ),
    ] = None,
    autoencoder: TrainedAutoencoder = None,
    shard_format: Annotated[
        ShardFormat, typer.Option("--format", help="safetensors files, or tar files for WebDataset.")
    ] = "safetensors",
    verify: Annotated[
        bool, typer.Option("--verify", is_eager=True, help="Only compare the shards in --out with their hashes.")
    ] = False,
) -> None:
    """Precompute latents and text embeddings of a recipe's images, for `davae train` to train from."""
    if not verify:
        check_recipe(recipe, overrides)
    from davae.training.runs.cache import default_folder, run_cache, run_verify

    if verify:
        text = run_verify(out or default_folder(recipe, overrides or ()))
    else:
        text = run_cache(recipe, overrides or (), out, autoencoder, shard_format)
    if text:
        say(text)
