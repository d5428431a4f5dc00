"""Images, latents and embeddings with random values, as data sets that training takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class RandomImages(Dataset[dict[str, Any]]):
    """Smooth random images in [-1, 1], the same at every call; one class, no captions.

    Args:
        count: images.
        side: in pixels.
        conditioning: put beside each image, the embeddings of its caption.
    """

    classes: tuple[str, ...] = ("anything",)

    def __init__(self, count: int, side: int, conditioning: Mapping[str, Tensor] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, max(2, side // 8), max(2, side // 8), generator=generator)
        images = torch.nn.functional.interpolate(
            coarse, size=(side, side), mode="bicubic", align_corners=False
        )
        self.images = (images * 2 - 1).clamp(-1, 1)
        self.conditioning = conditioning

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"image": self.images[index], "label": 0, "caption": "", "id": str(index)}
        return item if self.conditioning is None else item | {"conditioning": dict(self.conditioning)}


class RandomLatents(Dataset[dict[str, Any]]):
    """The same with latents in place of images, as a cache gives them.

    Args:
        images: what was encoded.
        encode: ``[B, 3, H, W]`` to ``[B, C + D, h, w]``.
    """

    def __init__(self, images: RandomImages, encode: Callable[[Tensor], Tensor]) -> None:
        self.classes = images.classes
        self.items = []
        for index in range(len(images)):
            item = images[index]
            self.items.append({**item, "latent": encode(item.pop("image")[None])[0].contiguous().cpu()})
            del self.items[-1]["image"]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.items[index])
