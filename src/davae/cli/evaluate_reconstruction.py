"""``davae evaluate reconstruction``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from davae.cli.evaluate_parts import named, open_networks, optional, report, write_json
from davae.cli.inspect import trained_resolution
from davae.cli.options import Device, FeatureNames, Json, some_images

if TYPE_CHECKING:
    from torch import Tensor

    from davae.evaluation.reconstruction.baselines import Row


def reconstruction(
    autoencoder: Annotated[Path, typer.Argument(help="Folder of a trained autoencoder.")],
    data: Annotated[
        str, typer.Option("--data", help="Images, as in a recipe (see docs/data.md).", callback=some_images)
    ],
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
    from davae.data import open_dataset
    from davae.evaluation.metrics.perceptual import Dino, Lpips
    from davae.evaluation.reconstruction.baselines import compare_reconstructions
    from davae.evaluation.reconstruction.crops import folder_crops, read_boxes
    from davae.pipelines.opening import autoencoder_folder, load_autoencoder
    from davae.pipelines.placing import chosen_device

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
        "lpips": None if lpips is None else optional("lpips", lambda: Lpips(lpips, where), unavailable),
        "dino": None if dino is None else optional("dino", lambda: Dino(dino, where), unavailable),
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
    import torch

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
