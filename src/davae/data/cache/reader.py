"""Reading a cache: a data set of latents and text embeddings in place of images and captions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.data.cache.fingerprint import Fingerprint, caption_key
from davae.data.cache.index import read_index
from davae.data.cache.shards import MAKE_AGAIN, ShardReader
from davae.data.cache.writer import LATENTS, read_about
from davae.data.images.dataset import size_in
from davae.data.images.protocol import Item, ItemDataset, is_mirrored
from davae.errors import DavaeError


class LatentCache(ItemDataset):
    """The latents of a data set from a folder that ``davae cache`` wrote, map-style and in the data set's order.

    An item is a dict:

    ============ ==========================================================================
    latent       float32 ``[C + D, h, w]`` as the transformer sees it
    conditioning named tensors of the caption as the transformer sees it; absent without text
    label, caption, id, skipped   as in :mod:`davae.data.images.protocol`
    ============ ==========================================================================

    If images were cached with mirroring, ``item(index, epoch)`` draws one of the two as the images' data
    set does, so that the stream of batches is the same.

    Args:
        folder: the cache.
        wanted: the fingerprint that it must have; ``None`` accepts any.
        seed: of the mirroring, as given to ``open_dataset``.

    Raises:
        DavaeError: there is no complete cache, it is damaged, or it has another fingerprint.
    """

    holds_latents = True

    def __init__(self, folder: str | Path, *, wanted: Fingerprint | None = None, seed: int = 0) -> None:
        self.folder = Path(folder)
        self.fingerprint = Fingerprint.load(self.folder)
        if wanted is not None:
            self.fingerprint.check(wanted, self.folder)
        about, index = read_about(self.folder), read_index(self.folder)
        if index.complete is None:
            raise DavaeError(
                f"the cache {self.folder} is not finished ({len(index.records)} entries so far): "
                f"run the same `davae cache` command again to continue it"
            )
        self.classes = list(about.get("classes", []))
        self.skipped = [(name, reason) for name, reason in about.get("skipped", [])]
        self.seed = seed
        latents = [r for r in index.records if r["shard"].startswith(f"{LATENTS}-")]
        self._texts = {r["key"]: r for r in index.records if not r["shard"].startswith(f"{LATENTS}-")}
        self._plain = {r["position"]: r for r in latents if not r["flip"]}
        self._mirrored = {r["position"]: r for r in latents if r["flip"]}
        self._check_whole(index.complete)
        self.flip = bool(self._mirrored)
        if about.get("in_buckets"):
            self.bucket_of = [self._plain[i]["bucket"] for i in range(len(self))]
        self._reader = ShardReader(self.folder)
        self.empty_conditioning: dict[str, Tensor] | None = self.conditioning("") if self._texts else None
        """The conditioning of the empty prompt, for dropout and guidance; ``None`` without text."""

    def __len__(self) -> int:
        return len(self._plain)

    def id(self, index: int) -> str:
        """The name of image ``index``."""
        return str(self._plain[index]["id"])

    def sizes_by_name(self) -> dict[str, str]:
        """The sizes of the cached images' files."""
        return {name: size_in(fact.stamp) for name, fact in self.fingerprint.sources.items()}

    def captions(self) -> list[str]:
        """The captions of all images in order."""
        return [self._plain[index]["caption"] for index in range(len(self))]

    def unmirrored(self) -> LatentCache:
        """The latents without mirroring."""
        plain = copy.copy(self)
        plain.flip = False
        return plain

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"latent {index} of {len(self)}")
        index %= len(self)
        line = self._plain[index]
        if self.flip and is_mirrored(self.seed, epoch, index):
            line = self._mirrored[index]
        item: Item = {
            "latent": self._reader.read(line)["latent"].float(),
            "label": line["label"],
            "caption": line["caption"],
            "id": line["id"],
            "skipped": [(name, reason) for name, reason in line["skipped"]],
        }
        if self._texts:
            item["conditioning"] = self.conditioning(line["caption"])
        return item

    def conditioning(self, caption: str) -> dict[str, Tensor]:
        """The named tensors of a cached caption, without a batch axis; floating-point ones in float32.

        Raises:
            DavaeError: the caption is not in the cache.
        """
        line = self._texts.get(caption_key(caption))
        if line is None:
            raise DavaeError(f"the cache {self.folder} does not hold the caption {caption[:60]!r}")
        found = self._reader.read(line)
        return {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in found.items()}

    def _check_whole(self, complete: dict[str, Any]) -> None:
        count = complete["images"]
        positions = set(range(count))
        whole = self._plain.keys() == positions and self._mirrored.keys() in (set(), positions)
        if not whole or len(self._texts) < complete["texts"]:
            raise DavaeError(f"the index of the cache {self.folder} lacks entries: {MAKE_AGAIN}")
