"""``davae doctor``."""

from __future__ import annotations

import importlib.util
import json
import logging
from typing import Annotated

import typer

from davae.tiny import TINY
from davae.tiny.transformer_table import transformer_table
from davae.training.run_directory import environment

_OPTIONAL = {
    "lpips": ("the LPIPS loss and metric", "pip install 'davae[lpips]'"),
    "torchvision": ("LPIPS", "install the build that matches your torch"),
    "efficientnet_lite_pytorch": ("feature distances without a download", "pip install 'davae[features]'"),
    "bitsandbytes": ("AdamW with moments of 8 bits", "pip install 'davae[eight-bit]'"),
}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Widen every known transformer class and print a table.")
    ] = False,
) -> None:
    """Versions, devices, optional parts, and what to install for what is missing."""
    if transformers:
        logging.getLogger("davae.warm_start").setLevel(logging.WARNING)  # the table tells the same
        typer.echo(transformer_table())
        return
    facts = environment()
    facts["embedded_base"] = (TINY / "model_index.json").is_file()
    facts["optional"] = {name: importlib.util.find_spec(name) is not None for name in _OPTIONAL}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(
        f"python {facts['python']} on {facts['platform']}; {facts['device']}, {facts['cpu_count']} cores"
    )
    typer.echo("  ".join(f"{name} {version}" for name, version in facts["packages"].items()))
    typer.echo(f"embedded base: {'present' if facts['embedded_base'] else 'MISSING; reinstall davae'}")
    for name, (use, remedy) in _OPTIONAL.items():
        typer.echo(f"{name}: {'present' if facts['optional'][name] else f'absent ({use}); {remedy}'}")
