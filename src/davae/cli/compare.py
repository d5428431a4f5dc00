"""``davae compare autoencoder``: autoencoders side by side, alone and under one transformer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from davae.cli.evaluate_parts import FeatureNames
from davae.cli.options import Device, Json, Repeats, new_folder
from davae.cli.output import wide_console, write_figures
from davae.errors import DavaeError
from davae.report.words import metric_label
from davae.training.compare import (
    AutoencoderScore,
    Comparison,
    DiffusionOptions,
    DiffusionScore,
    compare_autoencoders,
)
from davae.training.compare.trial import transformer_size

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``autoencoder`` a word of its own while it is the only one."""


@app.command()
def autoencoder(
    autoencoders: Annotated[
        list[str],
        typer.Argument(help="NAME=FOLDER, an autoencoder's or a pipeline's; the first is the reference."),
    ],
    data: Annotated[str, typer.Option("--data", help="A folder or data set of images.")],
    resolution: Annotated[int, typer.Option("--resolution", min=1, help="Side of the square image.")],
    images: Annotated[
        int, typer.Option("--images", min=1, help="Images to reconstruct, held out of training.")
    ] = 64,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=1, help="One token budget for all, by the patch size (default patch 1)."
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Images at a time through the autoencoders.")
    ] = 8,
    diffusion_steps: Annotated[
        int, typer.Option("--diffusion-steps", min=0, help="Train a transformer over each for so many steps.")
    ] = 0,
    transformer: Annotated[
        str, typer.Option("--transformer", help="Its size: S, B, L, XL or WIDTHxDEPTHxHEADS.")
    ] = "S",
    diffusion_batch: Annotated[
        int, typer.Option("--diffusion-batch", min=1, help="Images a training step.")
    ] = 32,
    train_images: Annotated[
        int, typer.Option("--train-images", min=1, help="Images to learn from, at most.")
    ] = 2048,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to make with each.")] = 32,
    sample_steps: Annotated[int, typer.Option("--sample-steps", min=1, help="Euler steps of a sample.")] = 25,
    guidance: Annotated[float, typer.Option("--guidance", help="Classifier-free guidance.")] = 2.0,
    repeats: Repeats = 5,
    device: Device = None,
    features: FeatureNames = None,
    lpips: Annotated[
        Path | None, typer.Option("--lpips", help="torchvision's VGG-16 weights, for LPIPS.")
    ] = None,
    json_file: Json = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for figures and picture sheets.", callback=new_folder),
    ] = None,
) -> None:
    """Compression, reconstruction and speed on the same images; with --diffusion-steps generation too."""
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
        named_folders(autoencoders),
        data=data,
        resolution=resolution,
        images=images,
        tokens=tokens,
        diffusion=options,
        train_images=train_images,
        batch=batch,
        repeats=repeats,
        device=device,
        out=out,
        features=features or (),
        lpips=lpips,
    )
    wide_console().print(comparison_table(result))
    write_figures(json_file, result.to_json())


def named_folders(texts: Sequence[str]) -> dict[str, str]:
    """``NAME=FOLDER`` pairs in their order.

    Raises:
        DavaeError: one is of another form, or a name is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (equals and name and folder):
            raise DavaeError(f"'{text}' is not of the form NAME=FOLDER")
        if name in found:
            raise DavaeError(f"the name '{name}' is given twice")
        found[name] = folder
    return found


def comparison_table(result: Comparison) -> Table:
    """One table, an autoencoder a column, a measurement a row."""
    table = Table(title=f"{result.images} images of {result.resolution} px, {result.device}")
    table.add_column("")
    for row in result.autoencoders:
        table.add_column(row.name, justify="right")
    lines = {
        "model": [row.kind for row in result.autoencoders],
        "latent": [f"f{row.compression} c{row.channels} p{row.patch}" for row in result.autoencoders],
        "tokens": [str(row.tokens) for row in result.autoencoders],
        "parameters": [f"{row.parameters / 1e6:.1f}M" for row in result.autoencoders],
        **_figure_lines(result.autoencoders, ("psnr", "ssim", "lpips", "swd/finest", "spectrum_db"), "{}"),
        "encode, images/s": [f"{row.encode_images_per_second:.3g}" for row in result.autoencoders],
        "decode, images/s": [f"{row.decode_images_per_second:.3g}" for row in result.autoencoders],
    }
    if result.diffusion:
        lines |= {
            "transformer": [f"{row.parameters / 1e6:.1f}M" for row in result.diffusion],
            "training, images/s": [f"{row.train_images_per_second:.3g}" for row in result.diffusion],
            "  over the first (FLOP-limited)": [
                f"{row.train_speedup:.2f}x ({row.train_flop_limited:.2f}x)" for row in result.diffusion
            ],
            "sampling, images/s": [f"{row.sample_images_per_second:.3g}" for row in result.diffusion],
            "  over the first (FLOP-limited) ": [
                f"{row.sample_speedup:.2f}x ({row.sample_flop_limited:.2f}x)" for row in result.diffusion
            ],
            "loss at the end": [f"{row.loss:.3f}" for row in result.diffusion],
            **_figure_lines(result.diffusion, ("swd/finest",), "{} of samples"),
        }
    lines |= _figure_lines(result.autoencoders, ("fid",), "r{}")
    lines |= _figure_lines(result.diffusion, ("fid", "kid"), "{} of samples")  # KID is without bias for few
    for name, values in lines.items():
        table.add_row(name, *values)
    return table


def _figure_lines(
    rows: Sequence[AutoencoderScore] | Sequence[DiffusionScore], metrics: Sequence[str], form: str
) -> dict[str, list[str]]:
    """Lines of the metrics that were measured, of all networks; ``form`` is of their names."""
    names = rows[0].figures if rows else ()
    found = [name for metric in metrics for name in names if name == metric or name.startswith(f"{metric}/")]
    labels = {name: metric_label(name).partition(", ") for name in found}
    return {
        form.format(metric) + comma + rest: [f"{row.figures[name]:.3f}" for row in rows]
        for name, (metric, comma, rest) in labels.items()
    }
