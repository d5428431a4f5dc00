"""``davae studio``."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import ModelDType, installed


def studio(
    model: Annotated[
        str | None,
        typer.Argument(
            help="An upgraded pipeline, an autoencoder or a run, a folder or a name on the hub "
            "(default: the newest finished one below --runs, else 'tiny-upgraded')."
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs; of what lies elsewhere nothing is shown.")] = Path("runs"),
    base: Annotated[
        str | None, typer.Option(help="The base pipeline, to compare with (default: the one that the run names).")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0 takes a free one.")] = 7860,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    dtype: ModelDType = None,
) -> None:
    """Show a page in the browser, on this machine alone: reconstruct, generate, plan, and watch runs."""
    installed("gradio", "studio")
    from davae.studio.page import serve

    serve(model, runs=runs, base=base, port=port, device=device, dtype=dtype)
