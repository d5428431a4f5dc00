"""``davae convert``: published checkpoints to folders in diffusers format."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.choices import ChannelOrder
from davae.cli.options import folder_of
from davae.runtime.console import say

app = typer.Typer(no_args_is_help=True)

Which = Literal["ema", "model"]

File = Annotated[Path, typer.Argument(help="The published file: .safetensors, or .pt and .ckpt with only tensors.")]
Out = Annotated[
    Path, typer.Option("--out", help="Folder to write; must be new or empty.", callback=folder_of("result"))
]
Resolution = Annotated[int, typer.Option("--resolution", min=1, help="Side of the base's training images, in pixels.")]
Weights = Annotated[Literal["ema", "model"], typer.Option("--weights", help="Which weights, if the file has both.")]
Statistics = Annotated[
    Path | None, typer.Option("--statistics", help="File with the latent's 'mean' and 'std' per channel.")
]


@app.command()
def lightningdit(
    file: File,
    out: Out,
    weights: Weights = "ema",
    size: Annotated[str | None, typer.Option("--size", help="The expected size, for example XL/1.")] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", min=1, help="Attention heads, if the weights do not tell.")
    ] = None,
    vae: Annotated[
        Path | None, typer.Option("--vae", help="Folder of its autoencoder, to write a whole pipeline.")
    ] = None,
) -> None:
    """Convert a LightningDiT transformer; with --vae, to a pipeline for `davae generate` and `davae upgrade`."""
    from davae.interop.conversion import convert_lightningdit_file

    made = convert_lightningdit_file(file, out, weights=weights, heads=heads, size=size, vae=vae)
    say(str(made))


@app.command()
def vavae(file: File, out: Out, resolution: Resolution = 256, statistics: Statistics = None) -> None:
    """Convert VA-VAE, or another LDM autoencoder, to an AutoencoderKL."""
    from davae.interop.conversion import convert_vavae_file

    say(str(convert_vavae_file(file, out, resolution=resolution, statistics=statistics)))


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
    """Convert the authors' ImageNet autoencoder to an AutoencoderDA."""
    from davae.interop.conversion import convert_imagenet_file

    made = convert_imagenet_file(file, out, base=base, resolution=resolution, statistics=statistics)
    say(str(made))


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
        Path | None, typer.Option("--lora", help="The transformer's LoRA, if it is in a separate file.")
    ] = None,
    vae: Annotated[
        Path | None, typer.Option("--vae", help="Folder of the converted autoencoder, to write a whole pipeline.")
    ] = None,
    order: Annotated[
        ChannelOrder, typer.Option("--order", help="Channel order of a transformer without branches.")
    ] = "detail_first",
) -> None:
    """Convert the authors' SD3 autoencoder to an AutoencoderDA, or their tuned SD3 transformer to diffusers' class."""
    from davae.interop.conversion import convert_sd3_file

    made = convert_sd3_file(
        file, out, base=base, statistics=statistics, weights=weights, lora=lora, vae=vae, order=order
    )
    say(str(made))


@app.command()
def comfyui(
    file: Annotated[Path, typer.Argument(help="A file of `davae export --format comfyui`.")],
    out: Out,
    base: Annotated[
        str | None, typer.Option("--base", help="With --vae, a transformer's base pipeline: writes a whole one.")
    ] = None,
    vae: Annotated[
        Path | None, typer.Option("--vae", help="The autoencoder's file, to write a whole pipeline.")
    ] = None,
) -> None:
    """Convert a single file for ComfyUI back to diffusers' folders."""
    from davae.interop.conversion import convert_comfyui_file

    say(str(convert_comfyui_file(file, out, base=base, vae=vae)))
