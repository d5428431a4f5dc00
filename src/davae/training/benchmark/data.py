"""Images, latents and embeddings with random values, as data sets that training takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from davae.data.images.protocol import Item, ItemDataset


class RandomImages(ItemDataset):
    """Smooth random images in [-1, 1], the same at every call; one class, no captions.

    Args:
        count: images.
        side: in pixels.
        conditioning: put beside each image, the embeddings of its caption.
    """

    def __init__(self, count: int, side: int, conditioning: Mapping[str, Tensor] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, max(2, side // 8), max(2, side // 8), generator=generator)
        images = torch.nn.functional.interpolate(
            coarse, size=(side, side), mode="bicubic", align_corners=False
        )
        self.images = (images * 2 - 1).clamp(-1, 1)
        self.conditioning, self.classes = conditioning, ["anything"]

    def __len__(self) -> int:
        return len(self.images)

    def id(self, index: int) -> str:
        """The image's number."""
        return str(index)

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index``, the same in each epoch."""
        item = {"image": self.images[index], "label": 0, "caption": "", "id": self.id(index)}
        return item if self.conditioning is None else item | {"conditioning": dict(self.conditioning)}


class RandomLatents(ItemDataset):
    """The same with latents in place of images, as a cache gives them.

    Args:
        images: what was encoded.
        encode: ``[B, 3, H, W]`` to ``[B, C + D, h, w]``.
    """

    def __init__(self, images: RandomImages, encode: Callable[[Tensor], Tensor]) -> None:
        self.classes, self.holds_latents = images.classes, True
        self.items = []
        for index in range(len(images)):
            item = images[index]
            self.items.append({**item, "latent": encode(item.pop("image")[None])[0].contiguous().cpu()})
            del self.items[-1]["image"]

    def __len__(self) -> int:
        return len(self.items)

    def id(self, index: int) -> str:
        """The image's number."""
        return str(index)

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index``, the same in each epoch."""
        return dict(self.items[index])
