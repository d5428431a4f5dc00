"""``davae evaluate reconstruction``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from davae.cli.evaluate_parts import (
    FeatureNames,
    named,
    open_networks,
    optional,
    report,
    write_json,
)
from davae.cli.inspect import trained_resolution
from davae.cli.options import Device, Json
from davae.data import open_dataset
from davae.errors import DavaeError
from davae.evaluation.crops import folder_crops, read_boxes
from davae.evaluation.dino_distance import DinoDistance
from davae.evaluation.frechet import file_hash
from davae.evaluation.reconstruction_baselines import Row, compare_reconstructions
from davae.pipelines.placing import chosen_device
from davae.pipelines.saving.opening import autoencoder_folder, load_autoencoder
from davae.training.perceptual import LpipsLoss


def reconstruction(
    autoencoder: Annotated[Path, typer.Argument(help="Folder of a trained autoencoder.")],
    data: Annotated[str, typer.Option("--data", help="Images, as in a recipe (see docs/data.md).")],
    resolution: Annotated[
        int | None, typer.Option("--resolution", min=1, help="Side in pixels (default: the run's).")
    ] = None,
    images: Annotated[
        int, typer.Option("--images", min=1, help="How many, evenly from the whole set.")
    ] = 256,
    crops: Annotated[
        list[str] | None,
        typer.Option(
            "--crops", help="NAME=FOLDER of crops told apart, such as lettering; can be given again."
        ),
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option("--boxes", help="Table (.csv) of parts of image files told apart by name."),
    ] = None,
    features: FeatureNames = None,
    lpips: Annotated[
        Path | None, typer.Option("--lpips", help="torchvision's VGG-16 weights, for LPIPS.")
    ] = None,
    dino: Annotated[
        Path | None, typer.Option("--dino", help="Folder of a DINO network, for its perceptual distance.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")] = 8,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """An autoencoder beside its baselines: base upscaled, base at full resolution, and the reduced image."""
    autoencoder_folder(autoencoder)
    where = chosen_device(device)
    side = resolution or trained_resolution(autoencoder)
    folders = dict(named(text, "--crops", "lettering=crops/lettering") for text in crops or [])
    boxed = {} if boxes is None else read_boxes(boxes)
    dataset = open_dataset(data, resolution=side)
    vae = load_autoencoder(autoencoder).to(where)
    unit = vae.spatial_compression
    apart: dict[str, Iterable[Tensor]] = {
        n: folder_crops(Path(folder), unit) for n, folder in folders.items()
    }
    for name, parts in boxed.items():
        apart[name] = chain(apart.get(name, ()), (box.cut(unit) for box in parts))
    unavailable: dict[str, str] = {}
    perceptual = {
        "lpips": None if lpips is None else optional("lpips", lambda: _Lpips(lpips, where), unavailable),
        "dino": None if dino is None else optional("dino", lambda: _Dino(dino, where), unavailable),
    }
    found = compare_reconstructions(
        vae,
        _batches(dataset, min(images, len(dataset)), batch),
        crops=apart,
        networks=open_networks(features or [], where, unavailable),
        perceptual={name: distance for name, distance in perceptual.items() if distance is not None},
    )
    rows = {name: _flat(row) for name, row in found.rows.items()}
    for row in found.rows.values():
        unavailable |= row.unavailable
    report(rows, unavailable)
    about = {"autoencoder": str(autoencoder), "data": data, "resolution": side, "unavailable": unavailable}
    write_json(json_file, about | found.to_json())


def _batches(dataset: object, count: int, size: int) -> Iterator[Tensor]:
    length = len(dataset)  # type: ignore[arg-type]
    for start in range(0, count, size):
        numbers = range(start, min(start + size, count))
        yield torch.stack([dataset[i * length // count]["image"] for i in numbers])  # type: ignore[index]


def _flat(row: Row) -> dict[str, float]:
    """Figures of a row with its crops, in one line."""
    shown = {"latent positions, relative": row.positions} | row.figures
    for crop, figures in row.crops.items():
        shown |= {f"{crop}: {metric}": value for metric, value in figures.items()}
    return shown


class _Lpips:
    """LPIPS of each pair, on the CPU."""

    def __init__(self, weights: Path, device: str) -> None:
        if importlib.util.find_spec("lpips") is None:
            raise DavaeError("LPIPS needs the package lpips: pip install 'davae[lpips]'")
        if not weights.is_file():
            raise DavaeError(
                f"LPIPS needs torchvision's VGG-16 weights, and {weights} is no file: fetch "
                "https://download.pytorch.org/models/vgg16-397923af.pth where there is a network and give its path"
            )
        self._weights, self._device = weights, device
        self._network = LpipsLoss(str(weights)).to(device)

    def describe(self) -> dict[str, Any]:
        return {
            "network": "LPIPS, VGG-16",
            "weights": self._weights.name,
            "weights_sha256": file_hash(self._weights),
            "resize": "none",
        }

    @torch.no_grad()
    def __call__(self, images: Tensor, made: Tensor) -> Tensor:
        pairs = zip(images.to(self._device).split(1), made.to(self._device).split(1), strict=True)
        return torch.stack([self._network(a, b) for a, b in pairs]).cpu()  # the loss is a mean, so one by one


class _Dino:
    """DINO distance of each pair, on the CPU."""

    def __init__(self, folder: Path, device: str) -> None:
        self._device = device
        self._network = DinoDistance(folder).to(device)
        self.describe = self._network.describe

    @torch.no_grad()
    def __call__(self, images: Tensor, made: Tensor) -> Tensor:
        return self._network(images.to(self._device), made.to(self._device)).cpu()
