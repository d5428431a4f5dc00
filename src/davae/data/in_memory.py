"""Images and latents kept in memory, and data sets that change items on access."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.data import Dataset

from davae.data.images.protocol import DatasetWrapper, Item, ItemDataset, is_mirrored
from davae.data.images.transforms import item_generator
from davae.data.loading.stream import read_items
from davae.errors import DavaeError
from davae.runtime.pictures import to_bytes
from davae.runtime.pixel_budget import in_parts
from davae.runtime.processes import gathered, is_first, share
from davae.runtime.progress import Progress

_READ_TOGETHER = 32


class ImagesInMemory(DatasetWrapper):
    """Each image is read once, changed by ``prepare`` and kept as 8-bit values.

    Random mirroring and crops are those of the first epoch; wrap this in :class:`davae.data.Mirrored` to mirror anew in
    every epoch.

    Args:
        source: a map-style data set of items with an ``image`` in [-1, 1].
        prepare: applied to ``[1, 3, H, W]`` once, for example a reduction of the resolution.
    """

    def __init__(self, source: Dataset[Item], prepare: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(source)
        self.flip, self.crop = False, "center"
        self.prepare = prepare
        self.kept: dict[int, Item] = {}

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index``, the same in each epoch."""
        if index not in self.kept:
            self._keep(index, self.source.item(index, 0))
        item = dict(self.kept[index])
        item["image"] = item["image"].float() / 127.5 - 1
        return item

    def unmirrored(self) -> ItemDataset:
        """This data set itself, which does not mirror."""
        return self

    def read_all(self, workers: int, timeout_s: float = 0.0) -> None:
        """Read all images now, with loader processes; otherwise each loader process would keep its own copies."""
        order = range(len(self))
        parts = read_items(self.source, order, batch_size=_READ_TOGETHER, workers=workers, timeout_s=timeout_s)
        for index, item in zip(order, (item for part in parts for item in part), strict=True):
            self._keep(index, item)

    def _keep(self, index: int, item: Item) -> None:
        image = item["image"]
        if self.prepare is not None:
            image = self.prepare(image[None])[0]
        self.kept[index] = {**item, "image": to_bytes(image).to(torch.uint8)}


class MixedScales(DatasetWrapper):
    """Whole images at base resolution, and crops of the same size at full resolution.

    An autoencoder trained on small whole images only fails at twice the resolution, since it has not seen edges and
    textures at other scales. Which images become crops, and which crops, depends on ``(seed, epoch, index)``.

    Args:
        source: a map-style data set of items with an ``image`` at full resolution.
        reduce: ``[1, 3, s h, s w]`` to ``[1, 3, h, w]``.
        crops: share of the items that are crops, in [0, 1].
        seed: of the choice.
    """

    def __init__(self, source: Dataset[Item], reduce: Callable[[Tensor], Tensor], crops: float, seed: int = 0) -> None:
        super().__init__(source)
        self._source_draws = self.flip or self.crop == "random"
        self.reduce, self.crops, self.seed = reduce, crops, seed
        self.crop = "random"

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        item = dict(self.source.item(index, epoch))
        image = item["image"]
        small = self.reduce(image[None])[0]
        random = item_generator(self.seed, epoch, index)
        if self._source_draws:  # perhaps from the same seed: the draws must be independent
            random = random.spawn(1)[0]
        if random.random() < self.crops:
            side = small.shape[-1]
            top, left = (int(v) for v in random.integers(0, image.shape[-1] - side + 1, size=2))
            small = image[:, top : top + side, left : left + side]
        item["image"] = small
        return item


class Prepared(DatasetWrapper):
    """The items of a data set, changed by a function on access.

    Args:
        source: a map-style data set of items.
        prepare: maps an item to the one for training.
    """

    def __init__(self, source: Dataset[Item], prepare: Callable[[Item], Item]) -> None:
        super().__init__(source)
        self.prepare = prepare

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        return self.prepare(self.source.item(index, epoch))


class LatentsInMemory(DatasetWrapper):
    """The latents of all images of a data set, encoded once; each process encodes its share and keeps all of them.

    If the data set mirrors, both latents of an image are kept, and ``item(index, epoch)`` draws one of them as the
    data set does, so that training is the same as from images.

    Args:
        source: a map-style data set of items with an ``image`` in [-1, 1].
        encode: ``[B, 3, H, W]`` to ``[B, C, h, w]``.
        prepare: further changes of an item, for example to add the pipeline's label or its caption's embedding.
        limit: use at most this many of the first images.
        workers: loader processes that read the images; 0 reads in this one.
        timeout_s: seconds to wait for a batch; 0 waits indefinitely.
        shown: name of the progress that is shown; empty shows none.

    Raises:
        DavaeError: the images are cropped at random, or reading them takes too long.
    """

    def __init__(
        self,
        source: Dataset[Item],
        encode: Callable[[Tensor], Tensor],
        prepare: Callable[[Item], Item],
        *,
        limit: int | None = None,
        workers: int = 0,
        timeout_s: float = 0.0,
        shown: str = "",
    ) -> None:
        super().__init__(source)
        self.holds_latents = True
        count = len(self.source) if limit is None else min(limit, len(self.source))
        self.bucket_of = None if self.bucket_of is None else self.bucket_of[:count]
        found = _encoded_share(self.source, count, {"latent": encode}, workers, timeout_s, shown)
        every = gathered([{**item, **latents} for item, latents in found], count)
        self._latents = [item["latent"] for item in every]
        # Prepared after gathering: what items share (embeddings of a caption) must not be sent with each of them.
        self.items = [prepare({**item, "latent": item["latent"][0]}) for item in every]

    def __len__(self) -> int:
        return len(self.items)

    def captions(self) -> list[str]:
        """The captions of the items in order."""
        return [item["caption"] for item in self.items]

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        item = dict(self.items[index])
        if self.flip and is_mirrored(self.seed, epoch, index):
            item["latent"] = self._latents[index][1]
        return item


class WithKept(DatasetWrapper):
    """The items of a data set with what frozen networks make of their images, made once and added under given names.

    As in `LatentsInMemory`, each process makes its share and keeps all, including what is made of mirrored images.

    Args:
        source: a map-style data set of items with an ``image`` in [-1, 1], not cropped at random.
        make: by name in the item, a function of ``[B, 3, H, W]`` to ``[B, ...]``.
        workers: loader processes that read the images; 0 reads in this one.
        timeout_s: seconds to wait for a batch; 0 waits indefinitely.
        shown: name of the progress that is shown; empty shows none.

    Raises:
        DavaeError: the images are cropped at random, or reading them takes too long.
    """

    def __init__(
        self,
        source: Dataset[Item],
        make: Mapping[str, Callable[[Tensor], Tensor]],
        *,
        workers: int = 0,
        timeout_s: float = 0.0,
        shown: str = "",
    ) -> None:
        super().__init__(source)
        count = len(self.source)
        found = _encoded_share(self.source, count, make, workers, timeout_s, shown)
        self.kept = gathered([kept for _, kept in found], count)

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        mirrored = self.flip and is_mirrored(self.seed, epoch, index)
        kept = {name: views[mirrored] for name, views in self.kept[index].items()}
        return {**self.source.item(index, epoch), **kept}


def _unaugmented(source: ItemDataset) -> ItemDataset:
    """The data set without mirroring, for encoding each image once.

    Raises:
        DavaeError: images are cropped at random, differently in each epoch.
    """
    if source.crop == "random":
        raise DavaeError(
            "data.crop=random cuts another part out of an image each time, so latents cannot be kept; set "
            "data.crop=center or data.cache_latents=false"
        )
    return source.unmirrored()


def _encoded_share(
    source: ItemDataset,
    count: int,
    encode: Mapping[str, Callable[[Tensor], Tensor]],
    workers: int,
    timeout_s: float,
    shown: str,
) -> Iterator[tuple[Item, dict[str, tuple[Tensor, ...]]]]:
    """This process's share of the first ``count`` items, each without its image, and by name what is made of the image
    and, if the data set mirrors, of its mirror image.
    """
    plain, mine = _unaugmented(source), share(count)
    with Progress(shown, len(mine), enabled=bool(shown) and is_first()) as progress:
        for part in read_items(plain, mine, batch_size=_READ_TOGETHER, workers=workers, timeout_s=timeout_s):
            items = [dict(item) for item in part]
            images = [item.pop("image") for item in items]
            views = [images, [image.flip(-1) for image in images]] if source.flip else [images]
            made = {name: [encode_by_size(view, one) for view in views] for name, one in encode.items()}
            for i, item in enumerate(items):
                progress.advance()
                yield item, {name: tuple(view[i] for view in of_views) for name, of_views in made.items()}


@torch.no_grad()
def encode_by_size(images: list[Tensor], encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Latents of images in the same order, on the CPU; images of equal size are encoded together, within a budget."""
    places: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        places.setdefault(image.shape, []).append(i)
    latents: dict[int, Tensor] = {}
    for where in places.values():
        encoded = [encode(part).cpu() for part in in_parts(torch.stack([images[i] for i in where]))]
        latents |= dict(zip(where, torch.cat(encoded)))
    return [latents[i] for i in range(len(images))]
