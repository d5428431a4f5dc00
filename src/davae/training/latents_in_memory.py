"""Keeping latents of a frozen encoder in memory, of mirrored images too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from davae.data import read_items
from davae.data.mirroring import crops_at_random, is_mirrored, item_of, unmirrored
from davae.errors import DavaeError
from davae.runtime.processes import gathered, share
from davae.training.memory import keep_facts

Item = dict[str, Any]

ENCODED_TOGETHER = 32
"""Images: a batch for the transformer may be too large for the autoencoder."""


class LatentsInMemory(Dataset[Item]):
    """The latents of all images of a data set, encoded once; each process encodes its share and holds all.

    Where the data set mirrors, both latents of an image are kept, and ``item(index, epoch)`` draws one of them as the
    data set does: training sees what it would see from the images.

    Args:
        source: a map-style data set of items with an ``image`` in [-1, 1].
        encode: ``[B, 3, H, W]`` to ``[B, C, h, w]``.
        prepare: what is done to an item besides, for example the pipeline's label or its caption's embedding.
        batch_size: images encoded together, as far as they have one size.
        limit: at most so many of the first images.
        workers: loader processes that read the images; 0 reads in this one.
        timeout_s: seconds that they may take for a batch; 0 waits for ever.

    Raises:
        DavaeError: the images are cropped at random, or reading them takes too long.
    """

    flip: bool
    seed: int

    def __init__(
        self,
        source: Dataset[Item],
        encode: Callable[[Tensor], Tensor],
        prepare: Callable[[Item], Item],
        *,
        batch_size: int = ENCODED_TOGETHER,
        limit: int | None = None,
        workers: int = 0,
        timeout_s: float = 0.0,
    ) -> None:
        keep_facts(self, source)
        count = len(source) if limit is None else min(limit, len(source))  # type: ignore[arg-type]
        parts = read_items(
            _still(source), share(count), batch_size=batch_size, workers=workers, timeout_s=timeout_s
        )
        found = _encoded(parts, encode, mirrored=self.flip)
        every = gathered([{**item, "latent": latents} for item, latents in found], count)
        self._latents = [item["latent"] for item in every]
        # Prepared here, not before: what items share (embeddings of a caption) must not be sent with each of them.
        self.items = [prepare({**item, "latent": item["latent"][0]}) for item in every]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.item(index, 0)

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        item = dict(self.items[index])
        if self.flip and is_mirrored(self.seed, epoch, index):
            item["latent"] = self._latents[index][1]
        return item


class WithBaseLatents(Dataset[Item]):
    """The images of a data set with the latents of a frozen encoder beside them, as ``base_latent``.

    As in `LatentsInMemory` each process encodes its share and holds all, mirrored ones too.

    Args:
        source: a map-style data set of items with an ``image`` in [-1, 1], not cropped at random.
        encode: ``[B, 3, H, W]`` to ``[B, C, h, w]``.
        batch_size: images encoded together, as far as they have one size.
        workers: loader processes that read the images; 0 reads in this one.
        timeout_s: seconds that they may take for a batch; 0 waits for ever.

    Raises:
        DavaeError: the images are cropped at random, or reading them takes too long.
    """

    flip: bool
    seed: int

    def __init__(
        self,
        source: Dataset[Item],
        encode: Callable[[Tensor], Tensor],
        *,
        batch_size: int = ENCODED_TOGETHER,
        workers: int = 0,
        timeout_s: float = 0.0,
    ) -> None:
        self.source = source
        keep_facts(self, source)
        count = len(source)  # type: ignore[arg-type]
        parts = read_items(
            _still(source), share(count), batch_size=batch_size, workers=workers, timeout_s=timeout_s
        )
        self.latents = gathered(
            [latents for _, latents in _encoded(parts, encode, mirrored=self.flip)], count
        )

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> Item:
        return self.item(index, 0)

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        mirrored = self.flip and is_mirrored(self.seed, epoch, index)
        return {**item_of(self.source, index, epoch), "base_latent": self.latents[index][mirrored]}


def _still(source: Any) -> Any:
    """A data set whose images can be encoded once: not mirrored.

    Raises:
        DavaeError: each epoch would crop them otherwise.
    """
    if crops_at_random(source):
        raise DavaeError(
            "data.crop=random cuts another part out of an image each time, so latents cannot be kept; set "
            "data.crop=center or data.cache_latents=false"
        )
    return unmirrored(source)


def _encoded(
    parts: Iterable[list[Item]], encode: Callable[[Tensor], Tensor], *, mirrored: bool
) -> Iterator[tuple[Item, tuple[Tensor, ...]]]:
    """Each item without its image, and the latents of the image and, where asked for, of its mirror image."""
    for part in parts:
        items = [dict(item) for item in part]
        images = [item.pop("image") for item in items]
        latents = [_encode_by_size(images, encode)]
        if mirrored:
            latents.append(_encode_by_size([image.flip(-1) for image in images], encode))
        yield from zip(items, zip(*latents, strict=True), strict=True)


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
