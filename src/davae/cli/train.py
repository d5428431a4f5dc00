"""``davae train autoencoder | diffusion | base | dc-ae``."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import Overrides, RecipeName, TrainedAutoencoder, check_recipe, folder_of
from davae.runtime.console import say

app = typer.Typer(no_args_is_help=True)

Out = Annotated[
    Path | None, typer.Option("--out", help="Run directory (default: runs/RECIPE-STAGE).", callback=folder_of("run"))
]
BaseOut = Annotated[
    Path | None, typer.Option("--out", help="Run directory (default: runs/RECIPE).", callback=folder_of("base run"))
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and exit.")]


@app.command()
def autoencoder(
    overrides: Overrides = None, recipe: RecipeName = "tiny", out: Out = None, dry_run: DryRun = False
) -> None:
    """Train stage 1: detail encoder and joint decoder on a frozen base autoencoder."""
    check_recipe(recipe, overrides, images=not dry_run, stages=("autoencoder",))
    from davae.training.runs.train import run_autoencoder

    say(run_autoencoder(recipe, overrides or (), out, dry_run=dry_run))


@app.command()
def diffusion(
    overrides: Overrides = None,
    recipe: RecipeName = "tiny",
    out: Out = None,
    autoencoder: TrainedAutoencoder = None,
    dry_run: DryRun = False,
) -> None:
    """Train stage 2: the warm-started transformer on structured latents."""
    check_recipe(recipe, overrides, images=not dry_run, stages=("diffusion",))
    from davae.training.runs.train import run_diffusion

    say(run_diffusion(recipe, overrides or (), out, autoencoder=autoencoder, dry_run=dry_run))


@app.command()
def base(
    overrides: Overrides = None, recipe: RecipeName = "tiny-base", out: BaseOut = None, dry_run: DryRun = False
) -> None:
    """Train a base pipeline: from scratch, as the embedded one was, or a native fine-tune of another."""
    check_recipe(recipe, overrides, images=not dry_run, stages=("autoencoder", "transformer"))
    from davae.training.runs.train import run_base

    say(run_base(recipe, overrides or (), out, dry_run=dry_run))


@app.command("dc-ae")
def dc_ae(
    overrides: Overrides = None,
    recipe: RecipeName = "dc-ae-small-f32",
    phase: Annotated[
        int, typer.Option("--phase", help="1: everything, 2: around the latent, 3: the decoder's head.")
    ] = 1,
    start: Annotated[
        Path | None, typer.Option("--from", help="Run or autoencoder to start from (default: the last phase's run).")
    ] = None,
    out: Out = None,
    dry_run: DryRun = False,
) -> None:
    """Train one phase of a deep compression autoencoder: low resolution, high resolution, or decoder head."""
    check_recipe(recipe, overrides, images=not dry_run, stages=(f"phase{phase}",))
    from davae.training.dc_ae.train import run_dc_ae

    say(run_dc_ae(recipe, overrides or (), out, phase=phase, start=start, dry_run=dry_run))
