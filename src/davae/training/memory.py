"""Keeping a data set in memory: images that are costly to make, and latents of a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from davae.data import item_generator
from davae.data.buckets import bucket_of
from davae.training.processes import gathered, share

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

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Item:
        return self.item(index, 0)

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        item = dict(self.source[index])
        image = item["image"]
        small = self.reduce(image[None])[0]
        random = item_generator(self.seed, epoch, index)
        if random.random() < self.crops:
            side = small.shape[-1]
            top, left = (int(v) for v in random.integers(0, image.shape[-1] - side + 1, size=2))
            small = image[:, top : top + side, left : left + side]
        item["image"] = small
        return item


class LatentsInMemory(Dataset[Item]):
    """The latents of all images of a data set, encoded once; each process encodes its share and holds all.

    Args:
        source: a map-style data set of items with an ``image`` in [-1, 1].
        encode: ``[B, 3, H, W]`` to ``[B, C, h, w]``.
        prepare: what is done to an item besides, for example the pipeline's label or its caption's embedding.
        batch_size: images encoded together, as far as they have one size.
    """

    def __init__(
        self,
        source: Dataset[Item],
        encode: Callable[[Tensor], Tensor],
        prepare: Callable[[Item], Item],
        *,
        batch_size: int = 32,
    ) -> None:
        _keep_facts(self, source)
        encoded: list[Item] = []
        count = len(source)  # type: ignore[arg-type]
        mine = share(count)
        for first in range(0, len(mine), batch_size):
            items = [dict(source[i]) for i in mine[first : first + batch_size]]
            latents = _encode_by_size([i.pop("image") for i in items], encode)
            encoded += [{**item, "latent": latent} for item, latent in zip(items, latents)]
        # Prepared here, not before: what items share (embeddings of a caption) must not be sent with each of them.
        self.items = [prepare(item) for item in gathered(encoded, count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return dict(self.items[index])


class WithBaseLatents(Dataset[Item]):
    """The images of a data set with the latents of a frozen encoder beside them, as ``base_latent``.

    As in `LatentsInMemory` each process encodes its share and holds all.

    Args:
        source: a map-style data set of items with an ``image`` in [-1, 1], the same in every epoch.
        encode: ``[B, 3, H, W]`` to ``[B, C, h, w]``.
        batch_size: images encoded together, as far as they have one size.
    """

    def __init__(
        self, source: Dataset[Item], encode: Callable[[Tensor], Tensor], *, batch_size: int = 32
    ) -> None:
        self.source = source
        _keep_facts(self, source)
        encoded: list[Tensor] = []
        count = len(source)  # type: ignore[arg-type]
        mine = share(count)
        for first in range(0, len(mine), batch_size):
            images = [source[i]["image"] for i in mine[first : first + batch_size]]
            encoded += _encode_by_size(images, encode)
        self.latents = gathered(encoded, count)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> Item:
        return {**self.source[index], "base_latent": self.latents[index]}


class Prepared(Dataset[Item]):
    """The items of a data set with something added or changed when they are asked for.

    Args:
        source: a map-style data set of items.
        prepare: from an item to the one that training sees.
    """

    def __init__(self, source: Dataset[Item], prepare: Callable[[Item], Item]) -> None:
        self.source, self.prepare = source, prepare
        _keep_facts(self, source)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Item:
        return self.item(index, 0)

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        found = self.source.item(index, epoch) if hasattr(self.source, "item") else self.source[index]
        return self.prepare(found)


def _keep_facts(wrapper: Any, source: Any) -> None:
    """What training asks of a data set besides items: its classes, skipped files and aspect-ratio buckets."""
    wrapper.classes = source.classes
    wrapper.skipped = getattr(source, "skipped", [])
    wrapper.bucket_of = bucket_of(source)


@torch.no_grad()
def _encode_by_size(images: list[Tensor], encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Latents of images in their order, on the CPU; images of one size are encoded together."""
    places: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        places.setdefault(image.shape, []).append(i)
    latents: dict[int, Tensor] = {}
    for where in places.values():
        encoded = encode(torch.stack([images[i] for i in where])).cpu()
        latents |= dict(zip(where, encoded))
    return [latents[i] for i in range(len(images))]
