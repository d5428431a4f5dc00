"""How the verbs that measure hand out their figures: a table for people, JSON for machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from davae.runtime.atomic_files import atomic_json


def wide_console() -> Console:
    """A console for tables of many columns; where it is no terminal, a file has room for all of them."""
    console = Console()
    return console if console.is_terminal else Console(width=max(140, console.width))


def write_figures(file: Path | None, values: dict[str, Any]) -> None:
    """Every figure as JSON, where a file was named."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_json(file, values)
