"""``davae upgrade``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.training.run import load_base


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(upgrade)


def upgrade(
    pipeline: Annotated[str, typer.Argument(help="'tiny', a pipeline folder, or a name on the hub.")],
    autoencoder: Annotated[Path, typer.Option(help="Folder of an AutoencoderDA made from its VAE.")],
    out: Annotated[Path, typer.Option(help="Where the warm-started pipeline goes.")],
) -> None:
    """Write the warm-started pipeline: same class, wider latent, base behaviour unchanged."""
    upgraded = upgrade_pipeline(load_base(pipeline), AutoencoderDA.from_pretrained(autoencoder))
    upgraded.save_pretrained(out)
    typer.echo(f"{type(upgraded).__name__} with {upgraded.vae.layout.channels} latent channels: {out}")
