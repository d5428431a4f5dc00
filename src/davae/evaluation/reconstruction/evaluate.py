"""``davae evaluate reconstruction`` as a function."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from davae.data import open_dataset
from davae.evaluation.features.open import open_networks, or_unavailable
from davae.evaluation.images import spread_batches, trained_resolution
from davae.evaluation.metrics.names import DINO, LPIPS
from davae.evaluation.metrics.psnr_ssim import Perceptual
from davae.evaluation.reconstruction.baselines import ReconstructionReport, compare_reconstructions
from davae.evaluation.reconstruction.crops import folder_crops, read_boxes
from davae.evaluation.upscalers import check_upscaler, open_upscalers
from davae.models.perceptual import DinoDistance, LpipsLoss
from davae.pipelines.saving.opening import autoencoder_folder, load_autoencoder
from davae.runtime.devices import chosen_device, wanted_dtype
from davae.runtime.pixel_budget import images_together


def evaluate_reconstruction(
    autoencoder: str | Path,
    data: str,
    *,
    beside: Mapping[str, str | Path] | None = None,
    upscalers: Mapping[str, str] | None = None,
    resolution: int | None = None,
    images: int = 256,
    crops: Mapping[str, str | Path] | None = None,
    boxes: str | Path | None = None,
    features: Sequence[str] | None = None,
    lpips: Path | None = None,
    dino: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> ReconstructionReport:
    """Compare an autoencoder with baselines: its decoder alone, the base enlarged and at full resolution, the reduced
    image, other details.

    Args:
        autoencoder: folder of a trained autoencoder.
        data: images, as in a recipe's ``data.path``.
        beside: name to folder of other trained autoencoders, such as a joint decoder trained alone.
        upscalers: name to what enlarges the base's image, see :func:`davae.evaluation.upscalers.open_upscaler`.
        resolution: side in pixels; by default the run's.
        images: how many, spaced evenly over the whole set.
        crops: name to folder of crops that are reported separately, such as lettering.
        boxes: table (``.csv``) of parts of image files that are reported separately by name.
        features: feature networks (:func:`davae.evaluation.features.open_network`).
        lpips: file of torchvision's VGG-16 weights, for LPIPS.
        dino: folder of a DINO network, for its perceptual distance.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the GPU, if any.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of the autoencoders; by default as saved.

    Returns:
        All figures, and reasons for the missing ones.

    Raises:
        DavaeError: the autoencoder, the images or the crops cannot be read, or their sizes do not fit.
    """
    folder, where, wanted = Path(autoencoder), chosen_device(device), wanted_dtype(dtype)
    autoencoder_folder(folder)
    side = resolution or trained_resolution(folder)
    for name, upscaler in (upscalers or {}).items():
        check_upscaler(name, upscaler)
    boxed = {} if boxes is None else read_boxes(boxes)
    dataset = open_dataset(data, resolution=side)
    vae = load_autoencoder(folder, dtype=wanted).to(where)
    others = {name: load_autoencoder(place, dtype=wanted).to(where) for name, place in (beside or {}).items()}
    unit = vae.spatial_compression
    apart: dict[str, Iterable[Tensor]] = {
        name: folder_crops(Path(place), unit) for name, place in (crops or {}).items()
    }
    for name, parts in boxed.items():
        apart[name] = chain(apart.get(name, ()), (box.cut(unit) for box in parts))
    unavailable: dict[str, str] = {}
    perceptual: dict[str, Perceptual | None] = {}
    if lpips is not None:
        perceptual[LPIPS] = or_unavailable(LPIPS, lambda: Perceptual(LpipsLoss(str(lpips)), where), unavailable)
    if dino is not None:
        perceptual[DINO] = or_unavailable(DINO, lambda: Perceptual(DinoDistance(dino), where), unavailable)
    spread = spread_batches(dataset, images, images_together(side, side))
    report = compare_reconstructions(
        vae,
        (torch.stack([item["image"] for item in items]) for items in spread),
        beside=others,
        upscalers=open_upscalers(upscalers or {}, where),
        crops=apart,
        networks=open_networks(features or [], where, unavailable),
        perceptual={name: distance for name, distance in perceptual.items() if distance is not None},
    )
    for row in report.rows.values():
        unavailable |= row.unavailable
    return replace(
        report,
        autoencoder=str(autoencoder),
        data=data,
        resolution=side,
        dtype=str(vae.dtype).removeprefix("torch."),
        unavailable=unavailable,
    )
