"""``davae doctor``."""

import json
import logging
from typing import Annotated

import typer

from davae.runtime.console import say


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Widen every known transformer class and print a table.")
    ] = False,
) -> None:
    """Show versions, hardware and optional packages, and how to install missing ones."""
    if transformers:
        from davae.bases.debug_transformers import transformer_table

        logging.getLogger("davae.warm_start").setLevel(logging.WARNING)  # the table says the same
        say(transformer_table())
        return
    from davae.training.checkpoints.run_directory import installation, installation_text

    facts = installation()
    say(json.dumps(facts, indent=2) if as_json else installation_text(facts))
