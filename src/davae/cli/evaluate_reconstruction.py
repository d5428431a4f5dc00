"""``davae evaluate reconstruction``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from davae.cli.evaluate_parts import (
    Device,
    FeatureNames,
    Json,
    chosen_device,
    open_networks,
    optional,
    report,
    write_json,
)
from davae.cli.inspect import trained_resolution
from davae.data import FolderSource, decode_image, image_to_tensor, open_dataset
from davae.errors import DavaeError
from davae.evaluation.reconstruction_baselines import Perceptual, Row, compare_reconstructions
from davae.models import AutoencoderDA
from davae.training.perceptual import LpipsLoss


def reconstruction(
    autoencoder: Annotated[Path, typer.Argument(help="Folder of a trained autoencoder.")],
    data: Annotated[str, typer.Option("--data", help="Images, as in a recipe (see docs/data.md).")],
    resolution: Annotated[
        int | None, typer.Option("--resolution", help="Side in pixels (default: the run's).")
    ] = None,
    images: Annotated[int, typer.Option("--images", help="How many, evenly from the whole set.")] = 256,
    crops: Annotated[
        list[str] | None,
        typer.Option(
            "--crops", help="NAME=FOLDER of crops told apart, such as lettering; can be given again."
        ),
    ] = None,
    features: FeatureNames = None,
    lpips: Annotated[
        Path | None, typer.Option("--lpips", help="torchvision's VGG-16 weights, for LPIPS.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Images at a time.")] = 8,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """An autoencoder beside its baselines: base upscaled, base at full resolution, and the reduced image."""
    if not (autoencoder / "config.json").is_file():
        raise DavaeError(f"no autoencoder in {autoencoder}: it has no config.json")
    where = chosen_device(device)
    side = resolution or trained_resolution(autoencoder)
    folders = dict(_named_folder(text) for text in crops or [])
    dataset = open_dataset(data, resolution=side)
    vae = AutoencoderDA.from_pretrained(autoencoder).to(where)
    unavailable: dict[str, str] = {}
    found = compare_reconstructions(
        vae,
        _batches(dataset, min(images, len(dataset)), batch),
        crops={name: crop_images(folder, vae.spatial_compression) for name, folder in folders.items()},
        networks=open_networks(features or [], where, unavailable),
        perceptual=None if lpips is None else optional("lpips", lambda: _lpips(lpips, where), unavailable),
    )
    rows = {name: _flat(row) for name, row in found.rows.items()}
    for row in found.rows.values():
        unavailable |= row.unavailable
    report(rows, unavailable)
    about = {"autoencoder": str(autoencoder), "data": data, "resolution": side, "unavailable": unavailable}
    write_json(json_file, about | found.to_json())


def crop_images(folder: Path, unit: int) -> Iterator[Tensor]:
    """Images of a folder one by one, ``[1, 3, H, W]``, never resized: sides cut to multiples of ``unit``."""
    source = FolderSource(folder, split=None)
    for index in range(len(source)):
        with source.open(index) as file:
            image = image_to_tensor(decode_image(file))
        height, width = (side // unit * unit for side in image.shape[-2:])
        if not height or not width:
            raise DavaeError(
                f"{folder}: {source.id(index)} has {image.shape[-1]} x {image.shape[-2]} pixels, less than the "
                f"{unit} of one latent position"
            )
        top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
        yield image[None, :, top : top + height, left : left + width]


def _batches(dataset: object, count: int, size: int) -> Iterator[Tensor]:
    length = len(dataset)  # type: ignore[arg-type]
    for start in range(0, count, size):
        numbers = range(start, min(start + size, count))
        yield torch.stack([dataset[i * length // count]["image"] for i in numbers])  # type: ignore[index]


def _named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise DavaeError(f"--crops {text}: write NAME=FOLDER, such as lettering=crops/lettering")
    return name, Path(folder)


def _flat(row: Row) -> dict[str, float]:
    """Figures of a row with its crops, in one line."""
    shown = {"latent positions, relative": row.positions} | row.figures
    for crop, figures in row.crops.items():
        shown |= {f"{crop}: {metric}": value for metric, value in figures.items()}
    return shown


def _lpips(weights: Path, device: str) -> Perceptual:
    if importlib.util.find_spec("lpips") is None:
        raise DavaeError("LPIPS needs the package lpips: pip install 'davae[lpips]'")
    if not weights.is_file():
        raise DavaeError(
            f"LPIPS needs torchvision's VGG-16 weights, and {weights} is no file: fetch "
            "https://download.pytorch.org/models/vgg16-397923af.pth where there is a network and give its path"
        )
    network = LpipsLoss(str(weights)).to(device)

    @torch.no_grad()
    def distances(images: Tensor, made: Tensor) -> Tensor:
        pairs = zip(images.to(device).split(1), made.to(device).split(1), strict=True)
        return torch.stack([network(a, b) for a, b in pairs]).cpu()  # the loss is a mean, so one by one

    return distances
