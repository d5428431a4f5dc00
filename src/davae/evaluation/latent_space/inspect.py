"""Inspection of a structured latent: statistics, spectra, separability of classes, contribution of the details."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.data import open_dataset
from davae.errors import DavaeError
from davae.evaluation.images import held_out_images, spread_batches, trained_resolution
from davae.evaluation.latent_space.projection import Method, project_latents
from davae.evaluation.latent_space.separability import linear_probe, nearest_neighbour_accuracy
from davae.evaluation.latent_space.spectra import (
    Spectrum,
    high_frequency_share,
    image_spectra,
    latent_spectra,
    local_distant_similarity,
)
from davae.evaluation.metrics.names import PSNR, SSIM
from davae.evaluation.metrics.psnr_ssim import pair_metrics
from davae.latents import grouped_mean
from davae.models import AutoencoderDA
from davae.pipelines.saving.opening import autoencoder_folder, load_autoencoder
from davae.runtime.devices import chosen_device, wanted_dtype
from davae.runtime.pixel_budget import in_parts
from davae.runtime.resizing import upscaled

_LEAST = 8  # images
_BAND_IMAGES = 32
"""Number of images for the spectra of what each detail group adds; each group needs one decoding of them."""
_EXAMPLES = 6


@dataclass(frozen=True)
class Part:
    """One part of the latent: base, details, or both.

    Attributes:
        channels: how many.
        linear_probe, linear_probe_std: held-out accuracy, mean and standard deviation over splits; ``None`` without
            labels.
        nearest_neighbours: accuracy of a vote of the five nearest other images.
        high_frequency_share, local_distant_similarity: see `davae.evaluation.latent_space.spectra`.
        projection: ``[N, 2]``, positions of the images in the map.
    """

    channels: int
    linear_probe: float | None
    linear_probe_std: float | None
    nearest_neighbours: float | None
    high_frequency_share: float
    local_distant_similarity: float
    projection: list[list[float]]


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect_autoencoder` found.

    Attributes:
        images: how many were looked at.
        scale, base_channels, detail_channels: of the autoencoder.
        labels: class of each image, -1 if there is none.
        parts: ``base``, ``detail`` and ``structured``.
        chance: share of the most frequent class.
        alignment_error: mean square of grouped detail mean minus ``z``, over the mean square of ``z``; Eq. 3.
        psnr, ssim: of reconstructions, means; ``whole``, details ``zeroed``, details ``shuffled`` among the images,
            and the ``base`` decoded by its own decoder and enlarged.
        image_high_frequency_share: of the images themselves, to compare the parts with.
        latent_spectra: name to (frequency, power): ``z`` and each detail group.
        image_spectra: the same of images, reconstructions, and what each detail group adds to them.
        channel_mean, channel_std: of every channel as the transformer sees it, base first.
        examples: a few ``images`` and what was made of them, ``[n, 3, H, W]``; not in the JSON.
    """

    images: int
    scale: int
    base_channels: int
    detail_channels: int
    labels: list[int]
    parts: dict[str, Part]
    chance: float | None
    alignment_error: float
    psnr: dict[str, float]
    ssim: dict[str, float]
    image_high_frequency_share: float
    latent_spectra: dict[str, Spectrum] = field(repr=False)
    image_spectra: dict[str, Spectrum] = field(repr=False)
    channel_mean: list[float] = field(repr=False)
    channel_std: list[float] = field(repr=False)
    examples: dict[str, Tensor] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values; without the examples."""
        values = asdict(replace(self, examples={}))
        del values["examples"]
        return values


def inspect_latents(
    autoencoder: str | Path,
    data: str | None = None,
    *,
    beside: Sequence[str | Path] = (),
    images: int = 256,
    resolution: int | None = None,
    method: Method = "tsne",
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, Inspection]:
    """Inspect trained autoencoders with the same images, as ``davae inspect`` does before it draws.

    :func:`davae.report.inspection.write_inspection` makes pictures of the result.

    Args:
        autoencoder: folder of a trained one.
        data: images, as in a recipe's ``data.path``; by default those that the run held out.
        beside: folders of others, such as one without alignment.
        images: how many, spaced evenly over the whole set.
        resolution: side in pixels; by default the run's.
        method: of the map.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the GPU, if any.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of the autoencoders; by default as saved.

    Returns:
        Inspections by title: the run's name, or the folder's; equal titles are numbered.

    Raises:
        DavaeError: an autoencoder or the images cannot be read, or there are fewer than 8.
    """
    where, wanted = chosen_device(device), wanted_dtype(dtype)
    folder = Path(autoencoder)
    folders = _titled([folder, *map(Path, beside)])
    side = resolution or trained_resolution(folder)
    # One data set for all: the others may have been trained on other images.
    dataset = held_out_images(folder, side) if data is None else open_dataset(data, resolution=side)
    if data is None and len(dataset) < _LEAST:
        raise DavaeError(
            f"the run of {folder} held out {len(dataset)} images; an inspection needs {_LEAST}: name more with --data"
        )
    items = [item for batch in spread_batches(dataset, images, images) for item in batch]
    pictures = torch.stack([item["image"] for item in items])
    labels = torch.tensor([item["label"] for item in items])
    return {
        title: inspect_autoencoder(load_autoencoder(place, dtype=wanted).to(where), pictures, labels, method=method)
        for title, place in folders.items()
    }


def _titled(folders: Sequence[Path]) -> dict[str, Path]:
    titled: dict[str, Path] = {}
    for folder in folders:
        place = autoencoder_folder(folder)
        title = place.resolve().parent.name if place.name == "autoencoder" else place.name
        again = sum(name.partition(" (")[0] == title for name in titled)
        titled[f"{title} ({again + 1})" if again else title] = folder
    return titled


@torch.no_grad()
def inspect_autoencoder(
    vae: AutoencoderDA,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    method: Method = "tsne",
    seed: int = 0,
) -> Inspection:
    """Inspect a trained autoencoder with images that it was not trained on.

    Args:
        vae: in any mode; used in evaluation mode.
        images: ``[N, 3, H, W]`` in [-1, 1], on any device.
        labels: ``[N]``, -1 for none; accuracies need a label of every image and two images of every class.
        method: of the map.
        seed: of the shuffle, the probe's split and t-SNE.

    Raises:
        DavaeError: fewer than 8 images, or sizes that do not fit.
    """
    if len(images) < _LEAST:
        raise DavaeError(f"an inspection needs at least {_LEAST} images, not {len(images)}")
    was_training = vae.training
    vae.eval()
    latents = _map(lambda x: vae.encode(x).latent_dist.mode(), vae, images)
    z, details = vae.layout.split(latents)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).roll(1)
    shuffled = details[_derangement(order)]

    def decode(x: Tensor, function: Callable[[Tensor], Tensor] = lambda part: vae.decode(part).sample) -> Tensor:
        return _map(function, vae, x, vae.spatial_compression).clamp(-1, 1)

    zeros = vae.config.absent_details == "zero"
    made = {
        "whole": decode(latents),
        "zeroed": decode(vae.layout.join(z, torch.zeros_like(details))) if zeros else decode(z, vae.decode_alone),
        "shuffled": decode(vae.layout.join(z, shuffled)),
    }
    if vae.config.has_base_decoder:
        small = _map(vae.decode_base, vae, latents, vae.spatial_compression).clamp(-1, 1)
        made["base"] = upscaled(small, images.shape[-2:])
    images = images.cpu().float()
    few = {name: made[name][:_BAND_IMAGES] for name in ("whole", "zeroed")}
    in_images = image_spectra(vae, latents[:_BAND_IMAGES], images[:_BAND_IMAGES], few, decode)
    vae.train(was_training)
    known = _usable_labels(labels, len(images))
    parts = {
        name: _part(part, known, method, seed)
        for name, part in (("base", z), ("detail", details), ("structured", latents))
    }
    raw_z = _map(lambda x: vae.alignment_target(vae.encode_base(x)), vae, images)
    raw_details = _map(lambda x: vae.encode_details(x).mean, vae, images)
    pairs = {name: pair_metrics(images, x) for name, x in made.items()}
    difference = grouped_mean(raw_details.float(), vae.layout.base_channels) - raw_z.float()
    return Inspection(
        images=len(images),
        scale=vae.scale,
        base_channels=vae.layout.base_channels,
        detail_channels=vae.layout.detail_channels,
        labels=[-1] * len(images) if labels is None else labels.tolist(),
        parts=parts,
        chance=None if known is None else float(known.bincount().max() / len(known)),
        alignment_error=float(difference.square().mean() / raw_z.float().square().mean()),
        psnr={name: float(found[PSNR].mean()) for name, found in pairs.items()},
        ssim={name: float(found[SSIM].mean()) for name, found in pairs.items()},
        image_high_frequency_share=high_frequency_share(images),
        latent_spectra=latent_spectra(vae, latents),
        image_spectra=in_images,
        channel_mean=latents.mean(dim=(0, 2, 3)).tolist(),
        channel_std=latents.std(dim=(0, 2, 3)).tolist(),
        examples={name: x[:_EXAMPLES] for name, x in ({"images": images} | made).items()},
    )


def _map(function: Callable[[Tensor], Tensor], vae: AutoencoderDA, x: Tensor, compression: int = 1) -> Tensor:
    """``function`` of images, or of latents of that compression, a few at a time."""
    return torch.cat([function(part.to(vae.device, vae.dtype)).float().cpu() for part in in_parts(x, compression)])


def _derangement(order: Tensor) -> Tensor:
    """A permutation without fixed points: each image of a random cycle gets its neighbour's details."""
    target = torch.empty_like(order)
    target[order] = order.roll(1)
    return target


def _usable_labels(labels: Tensor | None, count: int) -> Tensor | None:
    if labels is None or (labels < 0).any() or len(labels) != count:
        return None
    sizes = labels.unique(return_counts=True)[1]
    return labels.cpu().long() if len(sizes) > 1 and int(sizes.min()) > 1 else None


def _part(latents: Tensor, labels: Tensor | None, method: Method, seed: int) -> Part:
    probe = None if labels is None else linear_probe(latents, labels, seed=seed)
    return Part(
        channels=latents.shape[1],
        linear_probe=None if probe is None else probe.mean,
        linear_probe_std=None if probe is None else probe.std,
        nearest_neighbours=None if labels is None else nearest_neighbour_accuracy(latents, labels),
        high_frequency_share=high_frequency_share(latents),
        local_distant_similarity=local_distant_similarity(latents),
        projection=project_latents(latents, method, seed=seed).tolist(),
    )
