"""``davae evaluate reconstruction``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import Device, FeatureNames, Json, named_values, some_images, write_figures


def reconstruction(
    autoencoder: Annotated[Path, typer.Argument(help="Folder of a trained autoencoder.")],
    data: Annotated[
        str, typer.Option("--data", help="Images, as in a recipe (see docs/data.md).", callback=some_images)
    ],
    resolution: Annotated[
        int | None, typer.Option("--resolution", min=1, help="Side in pixels (default: the run's).")
    ] = None,
    images: Annotated[
        int, typer.Option("--images", min=1, help="How many, evenly from the whole set.")
    ] = 256,
    crops: Annotated[
        list[str] | None,
        typer.Option(
            "--crops", help="NAME=FOLDER of crops told apart, such as lettering; can be given again."
        ),
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option("--boxes", help="Table (.csv) of parts of image files told apart by name."),
    ] = None,
    features: FeatureNames = None,
    lpips: Annotated[
        Path | None, typer.Option("--lpips", help="torchvision's VGG-16 weights, for LPIPS.")
    ] = None,
    dino: Annotated[
        Path | None, typer.Option("--dino", help="Folder of a DINO network, for its perceptual distance.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")] = 8,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """An autoencoder beside its baselines: base upscaled, base at full resolution, and the reduced image."""
    folders = named_values(crops, "--crops", "lettering=crops/lettering")
    from davae.cli.tables import print_figures
    from davae.evaluation.reconstruction.evaluate import evaluate_reconstruction

    found = evaluate_reconstruction(
        autoencoder,
        data,
        resolution=resolution,
        images=images,
        crops=folders,
        boxes=boxes,
        features=features,
        lpips=lpips,
        dino=dino,
        batch=batch,
        device=device,
    )
    print_figures(found.figures(), found.unavailable)
    write_figures(json_file, found.to_json())
    if json_file is not None:
        typer.echo(json_file)
