"""``davae reconstruct`` as a function: a picture of images reconstructed by a trained autoencoder."""

from pathlib import Path
from typing import NamedTuple

import torch

from davae.data import open_dataset
from davae.errors import DavaeError
from davae.evaluation import psnr
from davae.pipelines.saving.opening import load_autoencoder
from davae.runtime.devices import chosen_device, wanted_dtype
from davae.runtime.pictures import save_rows
from davae.runtime.pixel_budget import in_parts
from davae.training.autoencoder.stage import upscaled_base


class Reconstructed(NamedTuple):
    """The picture's file, and the mean PSNR (dB) of its images."""

    picture: Path
    psnr: float
    gain: float
    """PSNR minus that of the base's enlarged reconstruction, dB."""
    images: int

    def __str__(self) -> str:
        return (
            f"{self.picture}: PSNR {self.psnr:.2f} dB, {self.gain:+.2f} dB over the base upscaled "
            f"({self.images} images)"
        )


@torch.no_grad()
def reconstruct_images(
    autoencoder: str | Path,
    images: str,
    *,
    resolution: int = 128,
    count: int = 8,
    out: str | Path = "reconstructions.png",
    device: str | None = None,
    dtype: str | None = None,
) -> Reconstructed:
    """Reconstruct images with an autoencoder, and with its base alone for comparison.

    Args:
        autoencoder: folder of a trained `AutoencoderDA`.
        images: a folder or data set of images; the first ``count`` are used.
        resolution: side of the square crop in pixels.
        out: the picture, with the rows input, base upscaled, reconstruction.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the GPU if there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default as saved.

    Raises:
        DavaeError: the autoencoder cannot be opened, there are no images, or ``out`` is one of them.
    """
    if Path(out).exists() and Path(out).resolve().is_relative_to(Path(images).expanduser().resolve()):
        raise DavaeError(f"{out} is one of the images, and would be written over: name another --out")
    where = chosen_device(device)
    vae = load_autoencoder(autoencoder, dtype=wanted_dtype(dtype)).to(where).eval()
    dataset = open_dataset(images, resolution=resolution)
    batch = torch.stack([dataset[i]["image"] for i in range(min(count, len(dataset)))])
    found = []
    for part in in_parts(batch):
        placed = part.to(vae.device, vae.dtype)
        made = vae.decode(vae.encode(placed).latent_dist.mode()).sample.clamp(-1, 1)
        found.append((made.float().cpu(), upscaled_base(vae, placed).float().cpu()))
    made, enlarged = (torch.cat(parts) for parts in zip(*found, strict=True))
    save_rows(Path(out), {"input": batch, "base, upscaled": enlarged, "reconstruction": made})
    reached, base = float(psnr(batch, made).mean()), float(psnr(batch, enlarged).mean())
    return Reconstructed(Path(out), reached, reached - base, len(batch))
