"""``davae convert``: published files to diffusers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from davae.choices import ChannelOrder
from davae.cli.options import new_folder
from davae.errors import DavaeError
from davae.interop.conversion import (
    Which,
    convert_imagenet_file,
    convert_lightningdit_file,
    convert_sd3_file,
    convert_vavae_file,
)

app = typer.Typer(no_args_is_help=True)

File = Annotated[
    Path, typer.Argument(help="The file as published: .safetensors, or .pt and .ckpt of tensors only.")
]
Out = Annotated[
    Path, typer.Option("--out", help="Folder to write; must be new or empty.", callback=new_folder)
]
Resolution = Annotated[
    int, typer.Option("--resolution", min=1, help="Image side that the base was trained at.")
]
Weights = Annotated[str, typer.Option("--weights", help="ema or model, where the file has both.")]
Statistics = Annotated[
    Path | None,
    typer.Option("--statistics", help="File of the latent's 'mean' and 'std', one value a channel."),
]


@app.command()
def lightningdit(
    file: File,
    out: Out,
    weights: Weights = "ema",
    size: Annotated[str | None, typer.Option("--size", help="What it must be, for example XL/1.")] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", min=1, help="Attention heads, where the weights do not tell.")
    ] = None,
    vae: Annotated[
        Path | None, typer.Option("--vae", help="Folder of its autoencoder: write a whole pipeline.")
    ] = None,
) -> None:
    """A LightningDiT transformer; with --vae a pipeline that `davae generate` and `davae upgrade` open."""
    made = convert_lightningdit_file(file, out, weights=_which(weights), heads=heads, size=size, vae=vae)
    typer.echo(str(made))


@app.command()
def vavae(file: File, out: Out, resolution: Resolution = 256, statistics: Statistics = None) -> None:
    """VA-VAE, or another LDM autoencoder, to an AutoencoderKL."""
    typer.echo(str(convert_vavae_file(file, out, resolution=resolution, statistics=statistics)))


@app.command("davae-imagenet")
def davae_imagenet(
    file: File,
    out: Out,
    base: Annotated[
        Path | None, typer.Option("--base", help="Folder of the converted VA-VAE, for its decoder.")
    ] = None,
    resolution: Resolution = 256,
    statistics: Statistics = None,
) -> None:
    """The authors' ImageNet autoencoder to an AutoencoderDA."""
    made = convert_imagenet_file(file, out, base=base, resolution=resolution, statistics=statistics)
    typer.echo(str(made))


@app.command("davae-sd3")
def davae_sd3(
    file: File,
    out: Out,
    base: Annotated[
        Path, typer.Option("--base", help="Folder of the SD3 pipeline, or of its VAE or transformer alone.")
    ],
    statistics: Statistics = None,
    weights: Weights = "ema",
    lora: Annotated[
        Path | None, typer.Option("--lora", help="The transformer's LoRA, where it is in a file of its own.")
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option("--vae", help="Folder of the converted autoencoder: write a whole pipeline."),
    ] = None,
    order: Annotated[
        str,
        typer.Option("--order", help="Channels of a transformer without branches: detail_first, base_first."),
    ] = "detail_first",
) -> None:
    """The authors' SD3 autoencoder to an AutoencoderDA, or their tuned SD3 transformer to diffusers' class."""
    if order not in get_args(ChannelOrder):
        raise DavaeError(f"--order is '{order}': it is {' or '.join(get_args(ChannelOrder))}")
    made = convert_sd3_file(
        file,
        out,
        base=base,
        statistics=statistics,
        weights=_which(weights),
        lora=lora,
        vae=vae,
        order=order,  # type: ignore[arg-type]
    )
    typer.echo(str(made))


def _which(weights: str) -> Which:
    if weights not in get_args(Which):
        raise DavaeError(f"--weights is '{weights}': it is ema or model")
    return weights  # type: ignore[return-value]
