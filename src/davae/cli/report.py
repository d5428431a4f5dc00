"""``davae report``."""

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="Directory of a finished run.")]) -> None:
    """Rebuild the report of a run from its files."""
    from davae.report import build_report

    typer.echo(build_report(run))
