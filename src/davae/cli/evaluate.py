"""``davae evaluate reconstruction | generation``: how good the images are."""

from __future__ import annotations

import typer

from davae.cli.evaluate_generation import generation
from davae.cli.evaluate_reconstruction import reconstruction

app = typer.Typer(no_args_is_help=True)
app.command()(reconstruction)
app.command()(generation)
