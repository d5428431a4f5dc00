"""Buckets: the sizes of training images, a few of nearly the same area for a resolution, and each image's own.

Images of a bucket are resized to one size with little cropping, so they stack into a batch that costs as much as
a square one. Sizes are (width, height) in pixels and multiples of ``unit``, the side of one token in pixels:
``f * s * patch``.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import numpy as np
from torch.utils.data import Dataset

from davae.data.images.dataset import Source, read_file
from davae.data.images.decode import UnreadableImage, upright_size
from davae.data.images.protocol import Item, as_item_dataset
from davae.data.images.transforms import Size
from davae.errors import DavaeError

logger = logging.getLogger(__name__)

AREA_TOLERANCE = 0.1
"""Maximum difference of a bucket's area from the square's, as a share of it."""

MAX_BUCKET_ASPECT = 2.0
"""Maximum ratio of a bucket's longer side to its shorter."""


def make_buckets(
    resolution: int, unit: int, *, max_aspect: float = MAX_BUCKET_ASPECT, tolerance: float = AREA_TOLERANCE
) -> list[Size]:
    """Sizes with about the area of ``resolution`` x ``resolution``, from tall to wide.

    For every number of token rows, the number of columns that gives a token count nearest to the square's, if that
    is within ``tolerance``.

    Args:
        resolution: side of the square in pixels.
        unit: side of a token in pixels; all sizes are multiples of it.
        max_aspect: maximum ratio of the longer side to the shorter.
        tolerance: maximum difference of an area from the square's, as a share of it.

    Raises:
        DavaeError: the resolution is not a multiple of ``unit``.
    """
    if unit < 1 or resolution < unit or resolution % unit:
        near = max(1, round(resolution / unit)) * unit if unit > 0 else resolution
        raise DavaeError(
            f"data.resolution is {resolution}, but one token covers {unit} x {unit} pixels: buckets need a "
            f"multiple of {unit}, the nearest is {near}"
        )
    side = resolution // unit
    found = set()
    for rows in range(1, math.ceil(side * math.sqrt(max_aspect) * (1 + tolerance)) + 1):
        columns = max(1, round(side * side / rows))
        even = max(rows, columns) <= max_aspect * min(rows, columns)
        if even and abs(rows * columns - side * side) <= tolerance * side * side:
            found |= {(columns, rows), (rows, columns)}  # both orientations
    return sorted(((w * unit, h * unit) for w, h in found), key=lambda size: (size[0] / size[1], size))


def check_buckets(sizes: Sequence[Sequence[int]], unit: int) -> list[Size]:
    """Check the sizes of a recipe; returns each distinct (width, height) once.

    Raises:
        DavaeError: a size is not two multiples of ``unit``, or there is none.
    """
    if not sizes:
        raise DavaeError("data.buckets is an empty list: give sizes as [width, height], or true")
    checked: dict[Size, None] = {}
    for size in sizes:
        if len(size) != 2 or any(side < unit or side % unit for side in size):
            raise DavaeError(
                f"data.buckets: {list(size)} is not [width, height] in multiples of {unit} pixels, "
                f"the side of one token"
            )
        checked[(int(size[0]), int(size[1]))] = None
    return list(checked)


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> int:
    """The index of the bucket with the nearest aspect ratio, which keeps most of an image of ``size``.

    Scaled to cover a bucket, an image keeps the share ``min(a, b) / max(a, b)`` of its pixels, with ``a`` its
    aspect ratio and ``b`` the bucket's. Ties go to the larger bucket, then to the first.
    """
    aspect = math.log(size[0] / size[1])
    return min(
        range(len(buckets)),
        key=lambda i: (round(abs(math.log(buckets[i][0] / buckets[i][1]) - aspect), 9), -buckets[i][0] * buckets[i][1]),
    )


def assign_buckets(
    source: Source, indices: Sequence[int], resolutions: Sequence[int], sizes: Mapping[int, Sequence[Size]]
) -> tuple[list[Size], list[int]]:
    """All sizes, each once, and the number of each image's own: of those of its resolution, the one nearest in shape.

    Shapes are read from headers, where a resolution has several sizes. An image with an unreadable header counts as a
    square; it is replaced by another image when it is decoded.

    Args:
        source: where the images come from.
        indices: which of them.
        resolutions: that of each of them.
        sizes: of each resolution.
    """
    every = list(dict.fromkeys(size for several in sizes.values() for size in several))
    if len(indices) > 20_000 and len(every) > len(sizes):
        logger.info("%s: reading the sizes of %d images for the buckets", source.name, len(indices))
    known: dict[tuple[int, Size], int] = {}
    chosen = []
    for index, resolution in zip(indices, resolutions, strict=True):
        shape = (1, 1)
        if len(sizes[resolution]) > 1:
            with suppress(UnreadableImage):
                shape = read_file(source, index, upright_size)
        if (resolution, shape) not in known:
            nearest = sizes[resolution][nearest_bucket(shape, sizes[resolution])]
            known[resolution, shape] = every.index(nearest)
        chosen.append(known[resolution, shape])
    counts = np.bincount(chosen, minlength=len(every))
    shown = ", ".join(f"{w} x {h}: {n}" for (w, h), n in zip(every, counts) if n)
    logger.info("%s: images by bucket (width x height): %s", source.name, shown)
    return every, chosen


def same_size_batches(dataset: Dataset[Item], indices: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Split ``indices`` into batches that can be stacked: of consecutive ones, or bucket by bucket."""
    numbers = as_item_dataset(dataset).bucket_of
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(0 if numbers is None else numbers[index], []).append(index)
    for _, members in sorted(groups.items()):
        for first in range(0, len(members), batch_size):
            yield members[first : first + batch_size]
