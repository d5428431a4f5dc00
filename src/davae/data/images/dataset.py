"""The data set for training: a source of image files, a choice among them, and a crop."""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from davae.data.images.decode import Result, UnreadableImage, decode_image, patiently
from davae.data.images.protocol import Item, ItemDataset, Skip
from davae.data.images.transforms import Size, SquareCrop, item_generator
from davae.errors import DavaeError

logger = logging.getLogger(__name__)


class Facts(NamedTuple):
    """Label and caption of an image."""

    label: int = -1
    caption: str = ""


class Source(Protocol):
    """Image files in a fixed order; a folder, a table or archives."""

    name: str
    classes: list[str]
    problems: list[Skip]
    """Problems of the source itself: damaged archives, captions for missing files."""
    commit: str | None
    """The commit on the hub, if it is known."""

    def __len__(self) -> int:
        """The number of image files, readable or not."""

    @property
    def summary(self) -> str:
        """One line of text: the number of images and of captions, what was read and what was ignored."""

    def id(self, index: int) -> str:
        """A name that is unique in the source and stays the same when images are added."""

    def open(self, index: int) -> BinaryIO:
        """Open the image file. May raise :class:`UnreadableImage` or ``OSError``."""

    def facts(self, index: int) -> Facts:
        """Label and caption. May raise :class:`UnreadableImage`."""

    def stamp(self, index: int) -> str:
        """Text that changes with the file, without reading it: its size and modification time."""


class JoinedSource:
    """Sources one after the other; classes of the same name are one.

    Names of images are those of the first source, and those of the others with the last part of their source's name
    before them, so that they stay the same when another source is added.

    Args:
        sources: at least one.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.name = " + ".join(source.name for source in sources)
        self.classes = list(dict.fromkeys(name for source in sources for name in source.classes))
        self.commit = sources[0].commit
        self._starts = [0, *itertools.accumulate(map(len, sources))]
        self._prefixes = [""]
        for number, source in enumerate(self.sources[1:], start=1):
            prefix = f"{Path(source.name).name}:"
            self._prefixes.append(prefix if prefix not in self._prefixes else f"{number}:{prefix}")
        self.problems = [
            (prefix + name, reason)
            for prefix, source in zip(self._prefixes, sources)
            for name, reason in source.problems
        ]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def summary(self) -> str:
        """The summaries of all."""
        return "; ".join(f"{source.name}: {source.summary}" for source in self.sources)

    def _place(self, index: int) -> tuple[int, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def id(self, index: int) -> str:
        """See :class:`Source`."""
        number, own = self._place(index)
        return self._prefixes[number] + self.sources[number].id(own)

    def open(self, index: int) -> BinaryIO:
        """See :class:`Source`."""
        number, own = self._place(index)
        return self.sources[number].open(own)

    def facts(self, index: int) -> Facts:
        """See :class:`Source`."""
        number, own = self._place(index)
        label, caption = self.sources[number].facts(own)
        names = self.sources[number].classes
        return Facts(self.classes.index(names[label]) if 0 <= label < len(names) else label, caption)

    def stamp(self, index: int) -> str:
        """See :class:`Source`."""
        number, own = self._place(index)
        return self.sources[number].stamp(own)


def size_in(stamp: str) -> str:
    """The size in bytes at the start of a stamp, as text; empty if it has none."""
    size, known, _ = stamp.partition(" bytes")
    return size if known else ""


def read_file(source: Source, index: int, read: Callable[[BinaryIO], Result], *, again: bool = True) -> Result:
    """What ``read`` makes of an image file of a source, by :func:`patiently`.

    Raises:
        UnreadableImage: as :func:`patiently`.
    """

    def attempt() -> Result:
        with source.open(index) as file:
            return read(file)

    return patiently(attempt, again=again)


class ImageDataset(ItemDataset):
    """Square image tensors of a source, map-style.

    An unreadable image is always replaced by the next readable one, and named in the item's ``skipped``. If the disk or
    the network fails, reading is tried again for some seconds, and the image is then replaced this one time. Once
    :meth:`captions` was called, labels and captions do not change. Crops and flips depend on ``(seed, epoch, index)``,
    see :meth:`set_epoch`.

    Args:
        source: where image files come from.
        indices: which of the source's images belong to this data set.
        transform: crop and resolution.
        seed: for random crops and flips.
        min_size: shortest side accepted, in pixels; of each of the source's images, or of all.
        skipped: images that were left out when the data set was opened.
        sizes: the sizes of the buckets, (width, height) in pixels; ``None`` for squares.
        bucket_of: the bucket of each image.
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        transform: SquareCrop,
        *,
        seed: int = 0,
        min_size: int | Sequence[int] = 1,
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
        self._bad: dict[int, str] = {}  # position -> reason; a cache that does not change results
        self._facts: dict[int, Facts] = {}  # index in the source -> facts when captions() was called

    def unmirrored(self) -> ImageDataset:
        """The same images without mirroring."""
        plain = copy.copy(self)
        plain.transform, plain.flip = replace(self.transform, flip=False), False
        return plain

    def __len__(self) -> int:
        return len(self.indices)

    def id(self, index: int) -> str:
        """The name of image ``index`` without reading it."""
        return self.source.id(self.indices[index])

    def captions(self) -> list[str]:
        """Captions of the images whose facts can be read; no image is decoded."""
        for index in self.indices:
            try:
                self._facts.setdefault(index, self.source.facts(index))
            except UnreadableImage:
                continue  # another item of the data set replaces it
        return [self._facts[index].caption for index in self.indices if index in self._facts]

    def has_captions(self) -> bool:
        """Whether any image has a caption; stops at the first one."""
        return any(self._caption(index) for index in self.indices)

    def _caption(self, index: int) -> str:
        """The caption of an image of the source; empty if it is unreadable."""
        try:
            return (self._facts.get(index) or self.source.facts(index)).caption
        except UnreadableImage:
            return ""

    def size(self, index: int) -> Size:
        """(width, height) of item ``index``."""
        if self.sizes is None or self.bucket_of is None:
            return self.transform.resolution, self.transform.resolution
        return self.sizes[self.bucket_of[index]]

    def stamps(self) -> dict[str, tuple[str, int, str]]:
        """The stamp, label and caption of each image, by id."""
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
        """The size in bytes of each image, by id; empty for tables and unreadable files."""
        found = {}
        for index in self.indices:
            try:
                stamp = patiently(partial(self.source.stamp, index))
            except UnreadableImage:
                stamp = ""
            found[self.source.id(index)] = size_in(stamp)
        return found

    def content_hash(self, index: int) -> str:
        """SHA-256 of the image file's bytes as hexadecimal digits; empty if it cannot be opened."""
        try:
            return read_file(self.source, self.indices[index], lambda file: hashlib.sha256(file.read()).hexdigest())
        except UnreadableImage:
            return ""

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``.

        Raises:
            DavaeError: no image of the data set can be read.
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
                    again = False  # its neighbours are on the same disk
                    logger.warning("%s: %s this time; the next image replaces it", self.id(position), error.reason)
                continue
            # The requested index draws the crop, so that a substitute does not appear twice with the same crop.
            generator = item_generator(self.seed, epoch, index)
            item["image"] = self.transform.to_size(item["image"], generator, self.size(index))
            return item | {"skipped": skipped}
        raise DavaeError(f"{self.source.name}: none of the {len(self)} images can be read; the first is {first}")

    def _read(self, position: int, *, again: bool = True) -> Item:
        if position in self._bad:
            raise UnreadableImage(self._bad[position])
        index = self.indices[position]
        label, caption = self._facts.get(index) or self.source.facts(index)
        least = self.min_size if isinstance(self.min_size, int) else self.min_size[index]
        picture = read_file(self.source, index, partial(decode_image, min_size=least), again=again)
        return {"image": picture, "label": label, "caption": caption, "id": self.source.id(index)}
