"""The data set that every trainer reads: a source of image files, a choice among them, and a crop."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import BinaryIO, NamedTuple, Protocol

from PIL.Image import Image

from davae.data.images.decode import UnreadableImage, decode_image, patiently
from davae.data.images.protocol import Item, ItemDataset, Skip
from davae.data.images.transforms import Size, SquareCrop, item_generator
from davae.errors import DavaeError

logger = logging.getLogger(__name__)


class Facts(NamedTuple):
    """What is known about an image besides its pixels."""

    label: int = -1
    caption: str = ""


class Source(Protocol):
    """Image files in a fixed order; a folder, a table or archives."""

    name: str
    classes: list[str]
    problems: list[Skip]
    """What was wrong with the source itself: damaged archives, captions for files that are not there."""
    summary: str
    """One line for people: how many images, how many with a caption, what was read and what was passed over."""
    commit: str | None
    """Of images from the hub, where it is known."""

    def __len__(self) -> int:
        """How many image files there are, readable or not."""

    def id(self, index: int) -> str:
        """A name that is unique in the source and does not change when images are added."""

    def open(self, index: int) -> BinaryIO:
        """The image file, from its beginning. May raise :class:`UnreadableImage` or ``OSError``."""

    def facts(self, index: int) -> Facts:
        """Label and caption. May raise :class:`UnreadableImage` where they cannot be read."""

    def stamp(self, index: int) -> str:
        """What changes when the image file does, without reading it: its size and time of change."""


def size_in(stamp: str) -> str:
    """The size in bytes that a stamp begins with; empty where it says none."""
    size, known, _ = stamp.partition(" bytes")
    return size if known else ""


class ImageDataset(ItemDataset):
    """Square image tensors of a source, map-style.

    An image that turns out unreadable is replaced by the next readable one, always the same, and named in the
    item's ``skipped``. One that a disk or a network does not give is tried again for some seconds, then replaced this
    once. Labels and captions stay those of the first call of :meth:`captions`, where there was one. Crops and flips
    follow ``(seed, epoch, index)``: see :meth:`set_epoch`.

    Args:
        source: where image files come from.
        indices: which of the source's images belong to this data set.
        transform: crop and resolution.
        seed: of the random crops and flips.
        min_size: shortest side accepted, in pixels.
        skipped: images that were left out when the data set was opened.
        sizes: the sizes of the buckets, (width, height) in pixels; none for squares.
        bucket_of: the bucket of each image.
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        transform: SquareCrop,
        *,
        seed: int = 0,
        min_size: int = 1,
        skipped: Sequence[Skip] = (),
        sizes: Sequence[Size] | None = None,
        bucket_of: Sequence[int] | None = None,
    ) -> None:
        self.source, self.classes, self.commit = source, source.classes, source.commit
        self.indices = list(indices)
        self.transform, self.crop, self.flip = transform, transform.crop, transform.flip
        self.seed = seed
        self.min_size = min_size
        self.skipped = list(skipped)
        self.sizes = None if sizes is None else list(sizes)
        self.bucket_of = None if bucket_of is None else list(bucket_of)
        self._bad: dict[int, str] = {}  # position -> reason; a shortcut only, never changes what comes out
        self._facts: dict[int, Facts] = {}  # index in the source -> what was known when captions were asked for

    def unmirrored(self) -> ImageDataset:
        """The same images as they are before mirroring."""
        plain = copy.copy(self)
        plain.transform, plain.flip = replace(self.transform, flip=False), False
        return plain

    def __len__(self) -> int:
        return len(self.indices)

    def id(self, index: int) -> str:
        """The name of image ``index`` without reading it."""
        return self.source.id(self.indices[index])

    def captions(self) -> list[str]:
        """Of the images that can be read, without decoding them."""
        for index in self.indices:
            try:
                self._facts.setdefault(index, self.source.facts(index))
            except UnreadableImage:
                continue  # another item of the data set stands in for it
        return [self._facts[index].caption for index in self.indices if index in self._facts]

    def has_captions(self) -> bool:
        """Whether any image has a caption; reads no further than the first."""
        return any(self._caption(index) for index in self.indices)

    def _caption(self, index: int) -> str:
        """That of one of the source's images; empty where another item stands in for it."""
        try:
            return (self._facts.get(index) or self.source.facts(index)).caption
        except UnreadableImage:
            return ""

    def size(self, index: int) -> Size:
        """(width, height) of image ``index`` as it comes out, whatever stands in for it."""
        if self.sizes is None or self.bucket_of is None:
            return self.transform.resolution, self.transform.resolution
        return self.sizes[self.bucket_of[index]]

    def stamps(self) -> dict[str, tuple[str, int, str]]:
        """Of each image by its id: what changes when its file does, its label and its caption."""
        found = {}
        for index in self.indices:
            try:
                label, caption = self._facts.get(index) or self.source.facts(index)
                stamp = patiently(partial(self.source.stamp, index))
            except UnreadableImage:  # replaced by another image when it is read
                stamp, label, caption = "unreadable", -1, ""
            found[self.source.id(index)] = (stamp, label, caption)
        return found

    def sizes_by_name(self) -> dict[str, str]:
        """Of each image by its id: its size in bytes; empty in tables, and where it cannot be read now."""
        found = {}
        for index in self.indices:
            try:
                stamp = patiently(partial(self.source.stamp, index))
            except UnreadableImage:
                stamp = ""
            found[self.source.id(index)] = size_in(stamp)
        return found

    def content_hash(self, index: int) -> str:
        """SHA-256 of the image file's bytes, hexadecimal; empty where it cannot be opened."""
        try:
            return patiently(partial(self._hash, self.indices[index]))
        except UnreadableImage:
            return ""

    def _hash(self, index: int) -> str:
        with self.source.open(index) as file:
            return hashlib.sha256(file.read()).hexdigest()

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``.

        Raises:
            DavaeError: not one image of the data set can be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        skipped: list[Skip] = []
        first = ""
        again = True
        for offset in range(len(self)):
            position = (index + offset) % len(self)
            try:
                item = self._read(position, again=again)
            except UnreadableImage as error:
                first = first or f"{self.id(position)}: {error.reason}"
                if error.lasting:
                    self._bad[position] = error.reason
                    skipped.append((self.id(position), error.reason))
                elif again:
                    again = False  # its neighbours lie on the same disk
                    logger.warning("%s: %s this time; the next image stands in", self.id(position), error.reason)
                continue
            # The asked-for index draws the crop, so that a substitute is not the same picture twice an epoch.
            generator = item_generator(self.seed, epoch, index)
            item["image"] = self.transform.to_size(item["image"], generator, self.size(index))
            return item | {"skipped": skipped}
        raise DavaeError(f"{self.source.name}: none of the {len(self)} images can be read; the first is {first}")

    def _read(self, position: int, *, again: bool = True) -> Item:
        if position in self._bad:
            raise UnreadableImage(self._bad[position])
        index = self.indices[position]
        label, caption = self._facts.get(index) or self.source.facts(index)
        picture = patiently(partial(self._decode, index), again=again)
        return {"image": picture, "label": label, "caption": caption, "id": self.source.id(index)}

    def _decode(self, index: int) -> Image:
        with self.source.open(index) as file:
            return decode_image(file, min_size=self.min_size)
