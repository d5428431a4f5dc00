"""``davae upgrade``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import new_folder
from davae.errors import DavaeError
from davae.pipelines import upgrade_pipeline
from davae.pipelines.families.class_fixes import unguarded
from davae.pipelines.saving.opening import load_autoencoder
from davae.pipelines.upgrade.base_match import layout_over
from davae.pipelines.upgrade.timestep_shift import TimestepShift
from davae.training.run import load_base
from davae.warm_start import check_warm_start


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(upgrade)


def upgrade(
    pipeline: Annotated[str, typer.Argument(help="'tiny', a pipeline folder, or a name on the hub.")],
    autoencoder: Annotated[Path, typer.Option(help="Folder of an AutoencoderDA made from its VAE.")],
    out: Annotated[Path, typer.Option(help="Where the warm-started pipeline goes.", callback=new_folder)],
    timestep_shift: Annotated[
        str, typer.Option(help="'base', 'native', or a number: see docs/pipelines.md.")
    ] = "base",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print sizes and the self-check's report as JSON.")
    ] = False,
) -> None:
    """Write the warm-started pipeline: same class, wider latent, base behaviour unchanged."""
    shift, vae = _shift(timestep_shift), load_autoencoder(autoencoder)  # what is quick to refuse comes first
    base = load_base(pipeline)
    upgraded = upgrade_pipeline(base, vae, timestep_shift=shift)
    layout = layout_over(base.vae, vae)
    with unguarded(upgraded.transformer):
        report = check_warm_start(base.transformer, upgraded.transformer, layout)
    upgraded.save_pretrained(out)
    if as_json:
        facts = {
            "pipeline": type(upgraded).__name__,
            "folder": str(out),
            "scale": vae.scale,
            "pixels_per_latent_position": vae.spatial_compression,
            "channels": {"base": layout.base_channels, "detail": layout.detail_channels},
            "scheduler": {
                k: v for k, v in upgraded.scheduler.config.items() if "shift" in k or "seq_len" in k
            },
            "self_check": {**dataclasses.asdict(report), "dtype": str(report.dtype).removeprefix("torch.")},
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(str(report))
    typer.echo(
        f"{type(upgraded).__name__} with {layout.base_channels} + {layout.detail_channels} latent channels, images "
        f"{vae.scale} times larger from the same tokens: {out}"
    )


def _shift(text: str) -> TimestepShift:
    if text in ("base", "native"):
        return text  # type: ignore[return-value]  # one of the two literals
    try:
        return float(text)
    except ValueError:
        raise DavaeError(f"--timestep-shift must be 'base', 'native' or a number, not '{text}'") from None
