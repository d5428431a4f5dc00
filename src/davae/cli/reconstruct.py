"""``davae reconstruct``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from davae.cli.options import Device, ModelDType, new_file
from davae.data import open_dataset
from davae.errors import DavaeError
from davae.evaluation import psnr
from davae.pipelines.placing import chosen_device, wanted_dtype
from davae.pipelines.saving.opening import load_autoencoder
from davae.training.autoencoder import upscaled_base
from davae.training.pictures import save_rows


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(reconstruct)


def _new_picture(file: Path) -> Path:
    """A file that can be written, of a kind that pictures are saved in."""
    new_file(file)
    kind = Image.registered_extensions().get(file.suffix.lower())
    if kind not in Image.SAVE:
        why = (
            f"no kind of picture ends in '{file.suffix}'"
            if kind is None
            else f"{kind} can be read, not written"
        )
        raise DavaeError(f"--out {file}: {why}; name it {file.stem}.png")
    return file


@torch.no_grad()
def reconstruct(
    autoencoder: Annotated[Path, typer.Argument(help="Folder of a trained AutoencoderDA.")],
    images: Annotated[str, typer.Argument(help="A folder or data set of images.")],
    resolution: Annotated[int, typer.Option(min=1, help="Side of the square crop in pixels.")] = 128,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 8,
    out: Annotated[
        Path, typer.Option(help="The picture: input, base upscaled, reconstruction.", callback=_new_picture)
    ] = Path("reconstructions.png"),
    device: Device = None,
    dtype: ModelDType = None,
) -> None:
    """Images through the autoencoder, beside what the base alone gives."""
    where = chosen_device(device)
    vae = load_autoencoder(autoencoder, dtype=wanted_dtype(dtype, where)).to(where).eval()
    dataset = open_dataset(images, resolution=resolution)
    batch = torch.stack([dataset[i]["image"] for i in range(min(count, len(dataset)))])
    placed = batch.to(vae.device, vae.dtype)
    made = vae.decode(vae.encode(placed).latent_dist.mode()).sample.clamp(-1, 1).float().cpu()
    enlarged = upscaled_base(vae, placed).float().cpu()
    save_rows(out, {"input": batch, "base, upscaled": enlarged, "reconstruction": made})
    gain = psnr(batch, made).mean() - psnr(batch, enlarged).mean()
    typer.echo(
        f"{out}: PSNR {psnr(batch, made).mean():.2f} dB, {gain:+.2f} dB over the base upscaled ({len(batch)} images)"
    )
