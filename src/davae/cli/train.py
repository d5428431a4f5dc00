"""``davae train autoencoder | diffusion | base | dc-ae``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import new_folder
from davae.training.dc_ae_phases import run_dc_ae
from davae.training.run import run_autoencoder, run_base, run_diffusion

app = typer.Typer(no_args_is_help=True)

RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides as section.key=value, e.g. data.path=photos/")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Run directory (default runs/RECIPE-STAGE).", callback=new_folder),
]
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


@app.command("dc-ae")
def dc_ae(
    overrides: Overrides = None,
    recipe: RecipeName = "dc-ae-small-f32",
    phase: Annotated[
        int, typer.Option("--phase", help="1: everything, 2: around the latent, 3: the decoder's head.")
    ] = 1,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Run or autoencoder to start from (default: the phase before's run)."),
    ] = None,
    out: Out = None,
    dry_run: DryRun = False,
) -> None:
    """A deep compression autoencoder in three phases: low resolution, high resolution, decoder's head."""
    _report(run_dc_ae(recipe, overrides or (), out, phase=phase, start=start, dry_run=dry_run))


def _report(text: str) -> None:
    typer.echo(text)
