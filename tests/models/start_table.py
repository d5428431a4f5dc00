"""The table of step-0 figures in docs/training.md: three starts of the new blocks, on a real autoencoder.

    python -m tests.models.start_table WEIGHTS PHOTOGRAPHS

WEIGHTS is the folder of an autoencoder of diffusers, PHOTOGRAPHS one of images, 12 of which are held out.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import davae
from davae.data import ImageDataset, RenderedDataset, open_dataset, read_items
from davae.evaluation import psnr
from davae.latents import grouped_mean
from davae.models import AutoencoderDA
from davae.models.latent_space import native_reconstruction, open_autoencoder
from davae.training.autoencoder.stage import upscaled_base

SIDE, HELD_OUT, FITTED_TO = 256, 12, 128


def images_of(dataset: ImageDataset | RenderedDataset, count: int) -> Iterator[Tensor]:
    """The first images, ``[1, 3, H, W]`` each."""
    for items in read_items(dataset, range(min(count, len(dataset))), batch_size=8):
        yield from (item["image"][None] for item in items)


def mean_psnr(pairs: list[tuple[Tensor, Tensor]]) -> float:
    return float(torch.cat([psnr(made.clamp(-1, 1), image) for made, image in pairs]).mean())


@torch.no_grad()
def measured(vae: AutoencoderDA, images: list[Tensor]) -> str:
    """PSNR, PSNR without details, and relative alignment error, as the cells of a row."""
    whole, without = [], []
    error = energy = 0.0
    for image in images:
        z, z_d = vae.encode_base(image), vae.encode_own_details(image).mean
        whole.append((vae.decode_structured(z, z_d), image))
        without.append((vae.decode_structured(z, torch.zeros_like(z_d)), image))
        target = vae.alignment_target(z)
        error += float((grouped_mean(z_d, target.shape[1]) - target).square().sum())
        energy += float(target.square().sum())
    return f"{mean_psnr(whole):.1f} dB | {mean_psnr(without):.1f} dB | {error / energy:.2f}"


def main(weights: Path, photographs: Path) -> None:
    """Print the table."""
    train, held_out = (
        open_dataset(str(photographs), resolution=SIDE, hold_out=HELD_OUT, part=part, quiet=True)
        for part in ("train", "held_out")
    )
    base = open_autoencoder(weights).float()
    images = list(images_of(held_out, HELD_OUT))
    vae = AutoencoderDA.from_base(base, detail_channels=16)
    with torch.no_grad():
        enlarged = mean_psnr([(upscaled_base(vae, image), image) for image in images])
        native = mean_psnr([(native_reconstruction(vae, image), image) for image in images])
    print(f"base enlarged {enlarged:.1f} dB, base at full size {native:.1f} dB")
    print("| D | start | PSNR | without details | alignment error |\n|---|---|---|---|---|")
    for details in (16, 32, 48, 64):
        for name, dropout in (("random", 0.0), ("warm", 0.0), ("fitted", 0.0), ("fitted, dropout 0.1", 0.1)):
            torch.manual_seed(0)
            start = "random" if name == "random" else "warm"
            vae = AutoencoderDA.from_base(base, detail_channels=details, detail_dropout=dropout, start=start)
            if name.startswith("fitted"):
                davae.fit_start(vae, images_of(train, FITTED_TO))
            print(f"| {details} | {name} | {measured(vae, images)} |", flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
