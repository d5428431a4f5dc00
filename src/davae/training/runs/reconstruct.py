"""``davae reconstruct`` as a function: a picture of images reconstructed by a trained autoencoder."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from davae.data import open_dataset
from davae.errors import DavaeError
from davae.evaluation import psnr
from davae.evaluation.metrics.names import BASE_ENLARGED, DECODER_ALONE
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
    alone: float | None = None
    """PSNR of the joint decoder without details, dB; None for an autoencoder that has none."""

    def __str__(self) -> str:
        alone = "" if self.alone is None else f"; {DECODER_ALONE} {self.alone:.2f} dB"
        return (
            f"{self.picture}: PSNR {self.psnr:.2f} dB, {self.gain:+.2f} dB over the {BASE_ENLARGED}{alone} "
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
    """Reconstruct images with an autoencoder, and for comparison with its base and with its decoder alone.

    Args:
        autoencoder: folder of a trained `AutoencoderDA`, or ``tiny-upgraded``.
        images: a folder or data set of images; the first ``count`` are used.
        resolution: side of the square crop in pixels.
        out: the picture, with the rows input; base, enlarged; decoder alone; reconstruction.
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
    rows: dict[str, list[Tensor]] = {"input": [batch], BASE_ENLARGED: [], DECODER_ALONE: [], "reconstruction": []}
    for part in in_parts(batch):
        placed = part.to(vae.device, vae.dtype)
        latent = vae.encode(placed).latent_dist.mode()
        made = {BASE_ENLARGED: upscaled_base(vae, placed), "reconstruction": vae.decode(latent).sample}
        if vae.uses_details:
            made[DECODER_ALONE] = vae.decode_alone(vae.layout.split(latent)[0])
        for name, image in made.items():
            rows[name].append(image.clamp(-1, 1).float().cpu())
    whole = {name: torch.cat(parts) for name, parts in rows.items() if parts}
    save_rows(Path(out), whole)
    reached = {name: float(psnr(batch, image).mean()) for name, image in whole.items()}
    own = reached["reconstruction"]
    return Reconstructed(Path(out), own, own - reached[BASE_ENLARGED], len(batch), reached.get(DECODER_ALONE))
