"""``davae configs`` and ``davae comfyui``: files that come with davae for use elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import folder_of
from davae.runtime.console import say

_Folder = typer.Option(help="A new or empty folder.", callback=folder_of("result"))


def configs(out: Annotated[Path, _Folder] = Path("configs")) -> None:
    """Write accelerate's configurations for one or several GPUs and machines, and a Slurm script."""
    from davae.runtime.package_files import write_package_files

    say("\n".join(map(str, write_package_files("configs", out, (".yaml", ".sbatch")))))


def comfyui(out: Annotated[Path, _Folder] = Path("custom_nodes/davae")) -> None:
    """Write the folder that goes into ComfyUI's custom_nodes: its nodes are those of this davae."""
    from davae.runtime.package_files import write_package_files

    files = write_package_files("comfyui/custom_node", out, (".py", ".json", ".md", ".toml"))
    say("\n".join(map(str, files)))
