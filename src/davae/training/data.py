"""The images of a recipe's ``data`` section."""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from davae.data import ImageDataset, ItemDataset, RenderedDataset, open_dataset
from davae.data.images.buckets import check_buckets, make_buckets
from davae.data.images.transforms import Size
from davae.errors import DavaeError
from davae.evaluation import psnr
from davae.pipelines.families import family_of
from davae.recipes.data import DataSettings
from davae.runtime.processes import gathered, share

logger = logging.getLogger(__name__)


def open_part(
    data: DataSettings, part: Literal["train", "held_out"], unit: int | None = None, *, quiet: bool = False
) -> ImageDataset | RenderedDataset:
    """Open the training or held-out part; held-out images are not mirrored, not cropped at random, not bucketed.

    Args:
        data: the recipe's section.
        part: which.
        unit: side of a token in pixels, see :func:`token_side`; only images of several sizes need it.
        quiet: do not log what is found.
    """
    training = part == "train"
    return open_dataset(
        data.path,
        resolution=data.resolution,
        crop=data.crop if training else "center",
        flip=data.flip and training,
        split=data.split,
        hold_out=data.hold_out,
        tenth_of_few=True,
        part=part,
        buckets=bucket_sizes(data, unit) if training else None,
        revision=data.revision,
        repeats=data.repeats,
        more=data.more,
        quiet=quiet,
    )


def open_held_out(data: DataSettings) -> ImageDataset | RenderedDataset:
    """Open the held-out part for measuring.

    Raises:
        DavaeError: no image is held out.
    """
    found = open_part(data, "held_out")
    if not len(found):
        raise DavaeError(
            f"no image of {data.path} is held out, and the figures are of such images: set data.hold_out above 0 and "
            "give at least two images"
        )
    return found


def _no_captions(count: int, pipeline: str) -> DavaeError:
    return DavaeError(
        f"{pipeline} learns from captions and none of the {count} images has one: put a text file of the same name "
        "beside each image, or a metadata.jsonl (see docs/data.md)"
    )


def check_images(data: DataSettings, *, captions_for: str | None = None) -> None:
    """Check the data before a base is loaded.

    Args:
        data: the recipe's section.
        captions_for: name of the pipeline's class if it is trained on captions.

    Raises:
        DavaeError: there are no images, most cannot be used, too many are to be held out, or none has a caption.
    """
    images = open_part(data.model_copy(update={"buckets": False}), "train", quiet=True)
    if not len(images):
        raise DavaeError(f"no image of {data.path} is left for training: set data.hold_out lower than {data.hold_out}")
    if captions_for is not None and not images.has_captions():
        raise _no_captions(len(images), captions_for)


def require_captions(captions: Sequence[str], pipe: Any) -> None:
    """Check that a pipeline conditioned on text has captions to train on; warn of images without one.

    Raises:
        DavaeError: no image has a caption.
    """
    empty = sum(not caption for caption in captions)
    if captions and empty == len(captions):
        raise _no_captions(len(captions), type(pipe).__name__)
    if empty:
        logger.warning("%d of %d images have no caption: trained without a prompt", empty, len(captions))


def open_training_part(data: DataSettings, vae: Any, pipe: Any) -> ImageDataset | RenderedDataset:
    """The training part for an upgrade, in sizes that fit the autoencoder and transformer if there are several."""
    return open_part(data, "train", None if data.of_one_size else token_side(vae, pipe))


def bucket_sizes(data: DataSettings, unit: int | None) -> dict[int, list[Size]] | None:
    """The sizes of ``data.buckets`` for each resolution; ``None`` if it is off.

    Raises:
        DavaeError: sizes that are not multiples of a token's side, or a training that has no buckets (no ``unit``).
    """
    if data.buckets is False:
        if unit is not None:
            for side in data.resolutions:
                check_divides(side, unit)
        return None
    if unit is None:
        raise DavaeError("data.buckets: the training of a base has one size; set data.buckets=false")
    if data.buckets is True:
        return {side: make_buckets(side, unit) for side in data.resolutions}
    return {data.resolution: check_buckets(data.buckets, unit)}


def check_divides(side: int, unit: int) -> None:
    """Check that the side of an image is a multiple of the side of a token, both in pixels.

    Raises:
        DavaeError: it is not; the message names the nearest multiple.
    """
    if side % unit:
        nearest = max(unit, round(side / unit) * unit)
        raise DavaeError(
            f"{side} pixels are not a multiple of {unit} (compression times patch); the nearest is {nearest}"
        )


def token_side(vae: Any, pipe: Any) -> int:
    """Side of a token in pixels of the full-resolution image: scale x base compression x patch size.

    Args:
        vae: the upgraded autoencoder.
        pipe: the base or the upgraded pipeline, with weights or without; ``None`` counts latent positions as tokens.
    """
    if pipe is None:
        return int(vae.spatial_compression)
    side = 240  # a multiple of every patch size in use
    probe = torch.empty(1, 1, side, side, device="meta")
    patch = side / math.sqrt(family_of(pipe).tokens(pipe.transformer, probe))
    return vae.spatial_compression * round(patch)


def rank_share_of_images(dataset: ItemDataset, count: int) -> tuple[Tensor, int]:
    """This process's share of the first ``count`` images, ``[n, 3, H, W]``, and the number over all processes."""
    count = min(count, len(dataset))
    return torch.stack([dataset[i]["image"] for i in share(count)]), count


def mean_psnr(images: Tensor, made: Tensor, count: int | None = None) -> float:
    """PSNR in dB, averaged over images.

    Args:
        images: ``[n, 3, H, W]`` in [-1, 1].
        made: reconstructions of the same shape; clamped to [-1, 1].
        count: number of images over all processes, if each has its :func:`rank_share_of_images`.
    """
    values = psnr(images, made.float().clamp(-1, 1))
    return float(values.mean()) if count is None else mean_of_all(values, count)


def mean_of_all(values: Tensor, count: int) -> float:
    """The mean over the images of all processes, in every process; all ranks must call this.

    Args:
        values: ``[n]``, one per image of this process.
        count: number of images over all processes.
    """
    return float(torch.tensor(gathered(values.tolist(), count)).mean())
