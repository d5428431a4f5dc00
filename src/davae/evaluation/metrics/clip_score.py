"""CLIP score (Hessel et al. 2021): similarity of images and their texts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from davae.errors import DavaeError


class ClipScore:
    """Mean of ``100 max(cos(image, text), 0)`` over pairs, added in batches."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0

    def update(self, images: Tensor, texts: Tensor) -> ClipScore:
        """Add embeddings ``[B, F]`` of images and ``[B, F]`` of their texts; returns itself.

        Raises:
            DavaeError: the shapes differ.
        """
        if images.ndim != 2 or images.shape != texts.shape:
            raise DavaeError(f"embeddings must be pairs of rows, got {list(images.shape)} and {list(texts.shape)}")
        cosine = F.cosine_similarity(images.double(), texts.double(), dim=1)
        self._sum += float(100 * cosine.clamp_min(0).sum())
        self.count += len(images)
        return self

    def score(self) -> float:
        """In [0, 100]; 25 to 35 is common for CLIP ViT-L/14 and good images.

        Raises:
            DavaeError: no pair was added.
        """
        if self.count == 0:
            raise DavaeError("a CLIP score needs at least one image with its text")
        return self._sum / self.count
