"""``davae configs``."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import folder_of
from davae.runtime.console import say


def configs(
    out: Annotated[Path, typer.Option(help="A new or empty folder.", callback=folder_of("result"))] = Path("configs"),
) -> None:
    """Write accelerate's configurations for one or several GPUs and machines, and a Slurm script."""
    from davae.configs import write_configs

    say("\n".join(map(str, write_configs(out))))
