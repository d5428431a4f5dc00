"""What both verbs of ``davae evaluate`` need: optional parts, tables and files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from davae.cli.options import wide_console, write_figures
from davae.errors import DavaeError

if TYPE_CHECKING:
    from rich.table import Table

    from davae.evaluation.features import FeatureNetwork

Part = TypeVar("Part")


def named(text: str, option: str, example: str) -> tuple[str, str]:
    """``NAME=VALUE`` taken apart.

    Raises:
        DavaeError: it is not of that form; the option is named, with an example.
    """
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise DavaeError(f"{option} {text}: write NAME=..., such as {example}")
    return name, value


def optional(name: str, make: Callable[[], Part], unavailable: dict[str, str]) -> Part | None:
    """A part that may be missing: then the reason is noted under ``name``, and the other metrics still run."""
    try:
        return make()
    except DavaeError as error:
        unavailable[name] = str(error)
        return None


def open_networks(names: Sequence[str], device: str, unavailable: dict[str, str]) -> list[FeatureNetwork]:
    """The feature networks that can be had."""
    from davae.evaluation.features import open_network

    opened = [
        optional(f"fid/{name}", functools.partial(open_network, name, device=device), unavailable)
        for name in names
    ]
    return [network for network in opened if network is not None]


def figures_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """A row a metric, a column a contestant."""
    from rich.table import Table

    table = Table()
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    metrics = list(dict.fromkeys(metric for figures in rows.values() for metric in figures))
    for metric in metrics:
        table.add_row(metric, *(_shown(figures.get(metric)) for figures in rows.values()))
    return table


def report(rows: Mapping[str, Mapping[str, float]], unavailable: Mapping[str, str]) -> None:
    """Print the table, and below it what is missing and why."""
    console = wide_console()
    console.print(figures_table(rows))
    for name, reason in unavailable.items():
        console.print(f"{name}: not measured. {reason}", markup=False, highlight=False, soft_wrap=True)


def write_json(file: Path | None, values: dict[str, Any]) -> None:
    """Every figure, where a file was named."""
    write_figures(file, values)
    if file is not None:
        typer.echo(str(file))


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
