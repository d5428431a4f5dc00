"""Left-right mirroring as a data set draws it, for those who keep what they read of a data set.

What is kept once would show each image as it was in the first epoch for ever. Images are therefore kept as they are,
and whether one comes mirrored is drawn anew in each epoch, with the draw of the data set itself.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from davae.data.dataset import Item
from davae.data.transforms import item_generator


def is_mirrored(seed: int, epoch: int, index: int) -> bool:
    """Whether a data set of centre crops with ``flip`` shows image ``index`` mirrored in ``epoch``."""
    return bool(item_generator(seed, epoch, index).random() < 0.5)


def item_of(dataset: Any, index: int, epoch: int) -> Item:
    """Item ``index`` as it looks in ``epoch``, where the data set knows of epochs."""
    item: Item = dataset.item(index, epoch) if hasattr(dataset, "item") else dataset[index]
    return item


def flips(dataset: Any) -> bool:
    """Whether a data set mirrors half of its images."""
    return bool(getattr(dataset, "flip", False))


def crops_at_random(dataset: Any) -> bool:
    """Whether a data set cuts another part out of an image in each epoch."""
    return getattr(dataset, "crop", "center") == "random"


def unmirrored(dataset: Any) -> Any:
    """A data set's items as they are before mirroring: itself, where it does not mirror."""
    return dataset.unmirrored() if flips(dataset) else dataset


class Mirrored(Dataset[Item]):
    """The items of a data set, the images of half of them mirrored: which half is drawn anew in each epoch.

    Args:
        source: a map-style data set of items with an ``image``, the same in every epoch.
        seed: of the draws.
    """

    flip = True

    def __init__(self, source: Any, seed: int = 0) -> None:
        self.source, self.seed = source, seed
        self.classes: list[str] = source.classes
        self.skipped = getattr(source, "skipped", [])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        return self.item(index, 0)

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        item = dict(item_of(self.source, index, epoch))
        if is_mirrored(self.seed, epoch, index):
            item["image"] = item["image"].flip(-1)
        return item

    def unmirrored(self) -> Any:
        """The items before mirroring."""
        return self.source
