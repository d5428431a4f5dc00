"""Keeping a data set in memory: images that are costly to make, and latents of a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

Item = dict[str, Any]


class ImagesInMemory(Dataset[Item]):
    """Each image is made once, changed by ``prepare`` and kept as 8-bit values.

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
            item = dict(self.source[index])
            image = item["image"]
            if self.prepare is not None:
                image = self.prepare(image[None])[0]
            item["image"] = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            self.kept[index] = item
        item = dict(self.kept[index])
        item["image"] = item["image"].float() / 127.5 - 1
        return item


class LatentsInMemory(Dataset[Item]):
    """The latents of all images of a data set, encoded once.

    Args:
        source: a map-style data set of items with an ``image`` in [-1, 1].
        encode: ``[B, 3, H, W]`` to ``[B, C, h, w]``.
        batch_size: images encoded together.
        progress: called with the number of images done so far.
    """

    def __init__(
        self,
        source: Dataset[Item],
        encode: Callable[[Tensor], Tensor],
        *,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.classes: list[str] = source.classes  # type: ignore[attr-defined]
        self.skipped = getattr(source, "skipped", [])
        self.items: list[Item] = []
        count = len(source)  # type: ignore[arg-type]
        for first in range(0, count, batch_size):
            items = [dict(source[i]) for i in range(first, min(first + batch_size, count))]
            with torch.no_grad():
                latents = encode(torch.stack([i.pop("image") for i in items])).cpu()
            self.items += [{**item, "latent": latent} for item, latent in zip(items, latents)]
            if progress is not None:
                progress(len(self.items))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return dict(self.items[index])
