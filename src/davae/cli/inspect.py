"""``davae inspect``: what a trained autoencoder's latent contains."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.cli.options import Device, ModelDType, folder_of, some_images
from davae.runtime.console import say, wide_console

Method = Literal["tsne", "pca"]


def inspect(
    autoencoder: Annotated[Path, typer.Argument(help="Folder of a trained autoencoder.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Images, as in a recipe (see docs/data.md; default: the run's held-out images).",
            callback=some_images,
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option("--beside", help="Another autoencoder, such as one without alignment; can be given again."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder of the pictures and inspection.json.", callback=folder_of("inspection")),
    ] = Path("inspection"),
    images: Annotated[int, typer.Option("--images", min=1, help="How many, spaced evenly over the data set.")] = 256,
    resolution: Annotated[
        int | None, typer.Option("--resolution", min=1, help="Side in pixels (default: the run's).")
    ] = None,
    method: Annotated[Method, typer.Option("--method", help="Projection of the class maps to the plane.")] = "tsne",
    device: Device = None,
    dtype: ModelDType = None,
) -> None:
    """Show class maps, spectra, channel statistics, and reconstructions, by the decoder alone and shuffled too."""
    from davae.cli.tables import inspection_table
    from davae.evaluation.latent_space.inspect import inspect_latents
    from davae.report.inspection import write_inspection

    found = inspect_latents(
        autoencoder,
        data,
        beside=beside or (),
        images=images,
        resolution=resolution,
        method=method,
        device=device,
        dtype=dtype,
    )
    files = write_inspection(found, out)
    wide_console().print(inspection_table(found))
    say(*files)
