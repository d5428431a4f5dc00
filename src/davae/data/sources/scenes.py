"""Rendered scenes with the interface of images from files."""

from __future__ import annotations

import copy
import hashlib

from davae.data.images.protocol import Item, ItemDataset, is_mirrored
from davae.data.scenes import ProceduralScenes


class RenderedDataset(ItemDataset):
    """Procedural scenes; ``flip`` mirrors them at random by ``(seed, epoch, index)``.

    Scenes are rendered square at their resolution, so nothing is cropped or skipped.
    """

    def __init__(self, scenes: ProceduralScenes, *, flip: bool = False, seed: int = 0) -> None:
        self.scenes, self.flip, self.seed = scenes, flip, seed
        self.classes = list(scenes.classes)

    def __len__(self) -> int:
        return len(self.scenes)

    def captions(self) -> list[str]:
        """The captions in order; they are the same at any resolution, so the scenes are painted small."""
        small = copy.copy(self.scenes)
        small.resolution = 8
        return [small[index]["caption"] for index in range(len(small))]

    def has_captions(self) -> bool:
        """Every scene has one."""
        return True

    def id(self, index: int) -> str:
        """The name of scene ``index``."""
        return self.scenes.id(index)

    def unmirrored(self) -> RenderedDataset:
        """The same scenes without mirroring."""
        plain = copy.copy(self)
        plain.flip = False
        return plain

    def stamps(self) -> dict[str, tuple[str, int, str]]:
        """As :meth:`ImageDataset.stamps`. A scene depends on its name; a hash of the first identifies the code."""
        if not len(self):
            return {}
        drawn = hashlib.sha256(self.scenes[0]["image"].numpy().tobytes()).hexdigest()
        return {self.id(i): (drawn, *self.scenes.facts(i)) for i in range(len(self))}

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        item: Item = dict(self.scenes[index])
        if self.flip and is_mirrored(self.seed, epoch, index % len(self)):
            item["image"] = item["image"].flip(-1)
        return item
