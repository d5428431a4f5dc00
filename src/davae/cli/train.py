"""``davae train autoencoder | diffusion | base``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from davae.training.run import run_autoencoder, run_base, run_diffusion

app = typer.Typer(no_args_is_help=True)

RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides as section.key=value, e.g. data.path=photos/")
]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory (default runs/RECIPE-STAGE).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Read and print the resolved recipe, then leave.")]


@app.command()
def autoencoder(
    overrides: Overrides = None, recipe: RecipeName = "tiny", out: Out = None, dry_run: DryRun = False
) -> None:
    """Stage 1: detail encoder and joint decoder on a frozen base autoencoder."""
    _report(run_autoencoder(recipe, overrides or (), out, dry_run=dry_run))


@app.command()
def diffusion(
    overrides: Overrides = None,
    recipe: RecipeName = "tiny",
    out: Out = None,
    autoencoder: Annotated[
        Path | None,
        typer.Option("--autoencoder", help="Folder of the trained autoencoder (default: stage 1's result)."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Stage 2: the warm-started transformer on structured latents."""
    _report(run_diffusion(recipe, overrides or (), out, autoencoder=autoencoder, dry_run=dry_run))


@app.command()
def base(
    overrides: Overrides = None, recipe: RecipeName = "tiny-base", out: Out = None, dry_run: DryRun = False
) -> None:
    """A small base pipeline from nothing, as the embedded one was made."""
    _report(run_base(recipe, overrides or (), out, dry_run=dry_run))


def _report(text: str) -> None:
    typer.echo(text)
