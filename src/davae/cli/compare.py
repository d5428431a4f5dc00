"""``davae compare autoencoder``: autoencoders compared, alone and with a diffusion transformer on each."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import (
    Device,
    FeatureNames,
    Json,
    ModelDType,
    Repeats,
    Upscalers,
    folder_of,
    named_values,
    some_images,
    upscalers_of,
    write_figures,
)
from davae.runtime.console import wide_console

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``autoencoder`` a subcommand although it is the only one."""


@app.command()
def autoencoder(
    autoencoders: Annotated[
        list[str], typer.Argument(help="NAME=FOLDER, an autoencoder's or a pipeline's; the first is the reference.")
    ],
    data: Annotated[str, typer.Option("--data", help="A folder or data set of images.", callback=some_images)],
    resolution: Annotated[int, typer.Option("--resolution", min=1, help="Side of the square image in pixels.")],
    images: Annotated[int, typer.Option("--images", min=1, help="Images to reconstruct, held out of training.")] = 64,
    upscaler: Upscalers = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="Tokens per image for all, by choice of patch size (default: patch 1)."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at a time through the autoencoders.")] = 8,
    diffusion_steps: Annotated[
        int, typer.Option("--diffusion-steps", min=0, help="Train a transformer on each for this many steps.")
    ] = 0,
    transformer: Annotated[
        str, typer.Option("--transformer", help="Its size: S, B, L, XL or WIDTHxDEPTHxHEADS.")
    ] = "S",
    diffusion_batch: Annotated[int, typer.Option("--diffusion-batch", min=1, help="Images per training step.")] = 32,
    train_images: Annotated[int, typer.Option("--train-images", min=1, help="Images to train on, at most.")] = 2048,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to generate with each.")] = 32,
    sample_steps: Annotated[int, typer.Option("--sample-steps", min=1, help="Euler steps per sample.")] = 25,
    guidance: Annotated[float, typer.Option("--guidance", min=0, help="Guidance scale; 1 is none.")] = 2.0,
    repeats: Repeats = 5,
    device: Device = None,
    dtype: ModelDType = None,
    features: FeatureNames = None,
    lpips: Annotated[Path | None, typer.Option("--lpips", help="torchvision's VGG-16 weights, for LPIPS.")] = None,
    json_file: Json = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for figures and picture sheets.", callback=folder_of("comparison")),
    ] = None,
) -> None:
    """Compression, reconstruction and speed on the same images; with --diffusion-steps, generation too."""
    folders = named_values(autoencoders, "autoencoder", "plain=runs/plain/autoencoder")
    from davae.experiments.compare import DiffusionOptions, compare_autoencoders
    from davae.experiments.compare.diffusion import transformer_size

    options = None
    if diffusion_steps:
        options = DiffusionOptions(
            steps=diffusion_steps,
            batch=diffusion_batch,
            size=transformer_size(transformer),
            samples=samples,
            sample_steps=sample_steps,
            guidance=guidance,
            repeats=repeats,
        )
    result = compare_autoencoders(
        folders,
        data=data,
        resolution=resolution,
        images=images,
        tokens=tokens,
        diffusion=options,
        train_images=train_images,
        batch=batch,
        repeats=repeats,
        device=device,
        dtype=dtype,
        out=out,
        features=features or (),
        lpips=lpips,
        upscalers=upscalers_of(upscaler),
    )
    write_figures(json_file, result.to_json())
    from davae.cli.tables import comparison_table

    wide_console().print(comparison_table(result))
