"""Keeping in memory images that are costly to make, and changing items when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from davae.data import item_generator, read_items
from davae.data.buckets import bucket_of
from davae.data.mirroring import crops_at_random, flips, item_of, unmirrored
from davae.runtime.pictures import to_bytes

Item = dict[str, Any]

_READ_TOGETHER = 32


class ImagesInMemory(Dataset[Item]):
    """Each image is made once, changed by ``prepare`` and kept as 8-bit values.

    Of a data set that mirrors or crops at random the first epoch is kept. :class:`davae.data.Mirrored` around this one
    mirrors anew in each.

    Args:
        source: a map-style data set of items with an ``image`` in [-1, 1].
        prepare: applied to ``[1, 3, H, W]`` once, for example a reduction of the resolution.
    """

    def __init__(self, source: Dataset[Item], prepare: Callable[[Tensor], Tensor] | None = None) -> None:
        self.source, self.prepare = source, prepare
        self.kept: dict[int, Item] = {}
        self.classes: list[str] = source.classes  # type: ignore[attr-defined]
        self.skipped = getattr(source, "skipped", [])

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Item:
        if index not in self.kept:
            self._keep(index, self.source[index])
        item = dict(self.kept[index])
        item["image"] = item["image"].float() / 127.5 - 1
        return item

    def read_all(self, workers: int, timeout_s: float = 0.0) -> None:
        """Make all images now, in loader processes, which would otherwise each keep their own."""
        order = range(len(self))
        parts = read_items(
            self.source, order, batch_size=_READ_TOGETHER, workers=workers, timeout_s=timeout_s
        )
        for index, item in zip(order, (item for part in parts for item in part), strict=True):
            self._keep(index, item)

    def _keep(self, index: int, item: Item) -> None:
        image = item["image"]
        if self.prepare is not None:
            image = self.prepare(image[None])[0]
        self.kept[index] = {**item, "image": to_bytes(image).to(torch.uint8)}


class MixedScales(Dataset[Item]):
    """Whole images at base resolution, and crops of the same size at full resolution.

    A general autoencoder has seen edges and textures at every scale. One that saw whole small images only does
    not: asked for twice the resolution, it fails. Which image becomes a crop, and which, follows from
    ``(seed, epoch, index)``.

    Args:
        source: a map-style data set of items with an ``image`` at full resolution.
        reduce: ``[1, 3, s h, s w]`` to ``[1, 3, h, w]``.
        crops: share of the items that are crops, in [0, 1].
        seed: of the choice.
    """

    def __init__(
        self, source: Dataset[Item], reduce: Callable[[Tensor], Tensor], crops: float, seed: int = 0
    ) -> None:
        self.source, self.reduce, self.crops, self.seed = source, reduce, crops, seed
        self.skipped = getattr(source, "skipped", [])
        self._source_draws = flips(source) or crops_at_random(source)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Item:
        return self.item(index, 0)

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        item = dict(item_of(self.source, index, epoch))
        image = item["image"]
        small = self.reduce(image[None])[0]
        random = item_generator(self.seed, epoch, index)
        if self._source_draws:  # perhaps from the same seed: a draw must not decide on both
            random = random.spawn(1)[0]
        if random.random() < self.crops:
            side = small.shape[-1]
            top, left = (int(v) for v in random.integers(0, image.shape[-1] - side + 1, size=2))
            small = image[:, top : top + side, left : left + side]
        item["image"] = small
        return item


class Prepared(Dataset[Item]):
    """The items of a data set with something added or changed when they are asked for.

    Args:
        source: a map-style data set of items.
        prepare: from an item to the one that training sees.
    """

    def __init__(self, source: Dataset[Item], prepare: Callable[[Item], Item]) -> None:
        self.source, self.prepare = source, prepare
        keep_facts(self, source)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Item:
        return self.item(index, 0)

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        return self.prepare(item_of(self.source, index, epoch))

    def unmirrored(self) -> Prepared:
        """The same items of images that are not mirrored."""
        return Prepared(unmirrored(self.source), self.prepare)


def keep_facts(wrapper: Any, source: Any) -> None:
    """What is asked of a data set besides items: classes, skipped files, aspect-ratio buckets, what epochs change."""
    wrapper.classes = source.classes
    wrapper.skipped = getattr(source, "skipped", [])
    wrapper.bucket_of = bucket_of(source)
    wrapper.flip, wrapper.seed = flips(source), getattr(source, "seed", 0)
    wrapper.crop = "random" if crops_at_random(source) else "center"
