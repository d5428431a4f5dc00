"""``davae reconstruct``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from davae.data import open_dataset
from davae.evaluation import psnr
from davae.models import AutoencoderDA
from davae.training.autoencoder import upscaled_base
from davae.training.pictures import save_rows


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(reconstruct)


@torch.no_grad()
def reconstruct(
    autoencoder: Annotated[Path, typer.Argument(help="Folder of a trained AutoencoderDA.")],
    images: Annotated[str, typer.Argument(help="A folder or data set of images.")],
    resolution: Annotated[int, typer.Option(help="Side of the square crop in pixels.")] = 128,
    count: Annotated[int, typer.Option(help="How many images.")] = 8,
    out: Annotated[Path, typer.Option(help="The picture: input, base upscaled, reconstruction.")] = Path(
        "reconstructions.png"
    ),
) -> None:
    """Images through the autoencoder, beside what the base alone gives."""
    vae = AutoencoderDA.from_pretrained(autoencoder).eval()
    dataset = open_dataset(images, resolution=resolution)
    batch = torch.stack([dataset[i]["image"] for i in range(min(count, len(dataset)))])
    made = vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
    enlarged = upscaled_base(vae, batch)
    save_rows(out, {"input": batch, "base, upscaled": enlarged, "reconstruction": made})
    gain = psnr(batch, made).mean() - psnr(batch, enlarged).mean()
    typer.echo(
        f"{out}: PSNR {psnr(batch, made).mean():.2f} dB, {gain:+.2f} dB over the base upscaled ({len(batch)} images)"
    )
