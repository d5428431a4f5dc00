"""Left-right mirroring as a data set draws it, for those who keep what they read of a data set.

What is kept once would show each image as it was in the first epoch for ever. Images are therefore kept as they are,
and whether one comes mirrored is drawn anew in each epoch, with the draw of the data set itself.
"""

from __future__ import annotations

from torch.utils.data import Dataset

from davae.data.images.protocol import DatasetWrapper, Item, ItemDataset
from davae.data.images.transforms import item_generator


def is_mirrored(seed: int, epoch: int, index: int) -> bool:
    """Whether a data set of centre crops with ``flip`` shows image ``index`` mirrored in ``epoch``."""
    return bool(item_generator(seed, epoch, index).random() < 0.5)


class Mirrored(DatasetWrapper):
    """The items of a data set, the images of half of them mirrored: which half is drawn anew in each epoch.

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
        """The items before mirroring."""
        return self.source.unmirrored()
