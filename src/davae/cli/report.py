"""``davae report``."""

from pathlib import Path
from typing import Annotated

import typer

from davae.runtime.console import say


def report(run: Annotated[Path, typer.Argument(help="Folder of a finished `davae demo`.")]) -> None:
    """Rebuild a demo's report from its files."""
    from davae.report import build_report

    say(build_report(run))
