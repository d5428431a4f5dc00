"""Options that several verbs share, and the checks of places to write to, made before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from davae.errors import DavaeError

LAST_SEED = 2**31 - 1
"""As far as every generator goes, with room for the images that count up from it."""


def new_file(file: Path | None) -> Path | None:
    """A file that can be written, seen before hours of work that would end without it.

    Raises:
        DavaeError: it is a folder, or its place does not take files.
    """
    if file is None:
        return None
    if os.path.isdir(file):
        raise DavaeError(f"{file} is a folder, and a file is to be written: add a name")
    _check_place(file)
    return file


def new_folder(folder: Path | None) -> Path | None:
    """A folder that is there or can be made.

    Raises:
        DavaeError: it is a file, or its place does not take folders.
    """
    if folder is not None:
        _check_place(folder / "any")
    return folder


def _check_place(file: Path) -> None:
    """Whether a file can be made there, with the folders above it."""
    # os.path is False below a folder that may not be entered, where Path raises PermissionError (Python 3.11)
    above = next(parent for parent in file.absolute().parents if os.path.exists(parent))
    if not os.path.isdir(above):
        raise DavaeError(f"{file.parent} cannot be a folder: {above} is a file. Name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise DavaeError(f"{file.parent} cannot be written: you may not write in {above}. Name another place")


Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:1 (default: the GPU, if any).")
]
ModelDType = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16 or float16 (default: as saved on a GPU, float32 on a CPU)."
    ),
]
DType = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write every figure here.", callback=new_file)]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Rounds; medians are told.")]
