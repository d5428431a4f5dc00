"""``davae upgrade``."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.cli.options import ModelDType, Variant, folder_of
from davae.errors import DavaeError
from davae.runtime.console import say


def upgrade(
    pipeline: Annotated[str, typer.Argument(help="'tiny', a pipeline folder, or a name on the hub.")],
    autoencoder: Annotated[Path, typer.Option(help="Folder of an AutoencoderDA made from its VAE.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the warm-started pipeline; new or empty.", callback=folder_of("result"))
    ],
    details: Annotated[
        Literal["all", "none"],
        typer.Option(help="'none': the base's own transformer, untuned, and the joint decoder as an upscaler."),
    ] = "all",
    timestep_shift: Annotated[str, typer.Option(help="'base', 'native', or a number: see docs/pipelines.md.")] = "base",
    variant: Variant = None,
    dtype: ModelDType = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print sizes and the self-check's report as JSON.")] = False,
) -> None:
    """Write the warm-started pipeline: the same class with wider latents; base channels are predicted as before."""
    shift = _shift(timestep_shift)
    from davae.bases.upgrade import write_upgraded

    written = write_upgraded(
        pipeline, autoencoder, out, timestep_shift=shift, variant=variant, dtype=dtype, details=details == "all"
    )
    say(json.dumps(written.to_json(), indent=2) if as_json else str(written))


def _shift(text: str) -> Literal["base", "native"] | float:
    if text == "base":
        return "base"
    if text == "native":
        return "native"
    try:
        return float(text)
    except ValueError:
        raise DavaeError(f"--timestep-shift must be 'base', 'native' or a number, not '{text}'") from None
