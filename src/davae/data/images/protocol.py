"""The interface of all data sets, of images or of latents, and a base class for wrappers.

An item is a dict:

======== ============================================================================
image    float32 ``[3, R, R]`` in [-1, 1]; with buckets ``[3, H, W]`` of the image's bucket
label    class number, -1 if there is none
caption  text, empty if there is none
id       the image's name within its source
skipped  ``(id, reason)`` of unreadable files found while reading this item
======== ============================================================================
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from davae.data.images.transforms import item_generator

Item = dict[str, Any]
Skip = tuple[str, str]
"""An image's id and why it was skipped."""


class ItemDataset(Dataset[Item], ABC):
    """A map-style data set of items. Class attributes are the defaults of its properties.

    An item depends on ``(seed, epoch, index)`` only.
    """

    classes: Sequence[str] = ()
    """Names of the classes; ``label`` is an index into this list."""
    skipped: Sequence[Skip] = ()
    """Files found to be unusable when the data set was opened."""
    bucket_of: Sequence[int] | None = None
    """The bucket of each item, whose items have one size; ``None`` if all items have one size."""
    flip: bool = False
    """Whether images are mirrored at random in each epoch."""
    crop: str = "center"
    """``center``, or ``random``: another crop in each epoch."""
    seed: int = 0
    """Seed of random crops and flips."""
    epoch: int = 0
    """The epoch of ``dataset[index]``."""
    holds_latents: bool = False
    """Whether items have a ``latent`` instead of an ``image``."""
    commit: str | None = None
    """The commit of images from the hub, 40 hexadecimal digits."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""

    @abstractmethod
    def id(self, index: int) -> str:
        """The name of image ``index`` without reading it."""

    def __getitem__(self, index: int) -> Item:
        return self.item(index, self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of ``dataset[index]``."""
        self.epoch = epoch

    def captions(self) -> list[str]:
        """The captions of all images in order; this default reads every item."""
        return [self[index]["caption"] for index in range(len(self))]

    def has_captions(self) -> bool:
        """Whether any image has a caption."""
        return any(self.captions())

    def sizes_by_name(self) -> dict[str, str]:
        """The size in bytes of each image as text, by id; empty if it is unknown without reading the image."""
        return {self.id(index): "" for index in range(len(self))}

    def unmirrored(self) -> ItemDataset:
        """The same items without mirroring. A data set with ``flip`` must override this."""
        return self


class DatasetWrapper(ItemDataset):
    """A wrapper around another data set, with its properties unless overridden.

    Args:
        source: what is wrapped.
    """

    def __init__(self, source: Dataset[Item]) -> None:
        self.source = as_item_dataset(source)
        self.classes, self.skipped = self.source.classes, self.source.skipped
        self.bucket_of, self.commit = self.source.bucket_of, self.source.commit
        self.flip, self.crop, self.seed = self.source.flip, self.source.crop, self.source.seed
        self.holds_latents = self.source.holds_latents

    def __len__(self) -> int:
        return len(self.source)

    def id(self, index: int) -> str:
        """The name of image ``index`` without reading it."""
        return self.source.id(index)

    def captions(self) -> list[str]:
        """The captions of the wrapped data set."""
        return self.source.captions()

    def has_captions(self) -> bool:
        """Whether any image of the wrapped data set has a caption."""
        return self.source.has_captions()

    def sizes_by_name(self) -> dict[str, str]:
        """The sizes of the wrapped data set."""
        return self.source.sizes_by_name()

    def unmirrored(self) -> ItemDataset:
        """The same wrapper around the items without mirroring."""
        plain = copy.copy(self)
        plain.source, plain.flip = self.source.unmirrored(), False
        return plain


def as_item_dataset(dataset: Dataset[Item]) -> ItemDataset:
    """Wrap a plain torch data set with ``len`` and ``dataset[index]``; an :class:`ItemDataset` is returned unchanged.

    Attributes of :class:`ItemDataset` that it has, such as ``classes`` or ``bucket_of``, are used.
    """
    return dataset if isinstance(dataset, ItemDataset) else _PlainDataset(dataset)


class _PlainDataset(ItemDataset):
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        for name in ItemDataset.__annotations__:
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))

    def __len__(self) -> int:
        return len(self._dataset)

    def item(self, index: int, epoch: int) -> Item:
        known = hasattr(self._dataset, "item")
        item: Item = self._dataset.item(index, epoch) if known else self._dataset[index]
        return item

    def id(self, index: int) -> str:
        return str(self._dataset.id(index)) if hasattr(self._dataset, "id") else f"image {index}"

    def captions(self) -> list[str]:
        own = getattr(self._dataset, "captions", None)
        return list(own()) if callable(own) else super().captions()

    def sizes_by_name(self) -> dict[str, str]:
        known = hasattr(self._dataset, "sizes_by_name")
        return dict(self._dataset.sizes_by_name()) if known else super().sizes_by_name()

    def unmirrored(self) -> ItemDataset:
        return as_item_dataset(self._dataset.unmirrored()) if self.flip else self


def is_mirrored(seed: int, epoch: int, index: int) -> bool:
    """Whether a data set of centre crops with ``flip`` shows image ``index`` mirrored in ``epoch``."""
    return bool(item_generator(seed, epoch, index).random() < 0.5)


class Mirrored(DatasetWrapper):
    """The items of a data set with their images mirrored at random, drawn anew in each epoch.

    Args:
        source: a map-style data set of items with an ``image``, the same in every epoch.
        seed: of the draws.
    """

    def __init__(self, source: Dataset[Item], seed: int = 0) -> None:
        super().__init__(source)
        self.flip, self.seed = True, seed

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        item = dict(self.source.item(index, epoch))
        if is_mirrored(self.seed, epoch, index):
            item["image"] = item["image"].flip(-1)
        return item

    def unmirrored(self) -> ItemDataset:
        """The items without mirroring."""
        return self.source.unmirrored()
