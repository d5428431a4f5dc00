"""The interface of feature networks, and the resizing that published ones expect."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Features(NamedTuple):
    """Features of a batch: rows ``[B, F]``, and class logits ``[B, K]`` if the network has classes; float32."""

    rows: Tensor
    logits: Tensor | None = None


class FeatureNetwork(Protocol):
    """Images in, features out. Frozen, in evaluation mode."""

    name: str
    """The name that it was opened by."""

    def describe(self) -> dict[str, Any]:
        """Weights with their SHA-256, and the preprocessing: everything needed to reproduce its numbers."""

    def __call__(self, images: Tensor) -> Features:
        """Features of ``[B, 3, H, W]`` in [-1, 1], rounded to 8 bits first, as image files are."""


def resize_tensorflow1(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resizing as in TensorFlow 1, inside the Inception graph of FID: output pixel i is at ``i * in / out``.

    No half-pixel centres and no antialiasing; published Fréchet distances contain both flaws.
    """
    for axis, out in ((-2, height), (-1, width)):
        size = images.shape[axis]
        place = torch.arange(out, dtype=images.dtype, device=images.device) * (size / out)
        low = place.long()
        high = (low + 1).clamp_max(size - 1)
        share = place - low
        share = share[:, None] if axis == -2 else share
        below, above = images.index_select(axis, low), images.index_select(axis, high)
        images = below + (above - below) * share
    return images


def standardise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """0..255 to ``(x / 255 - mean) / std`` per channel."""
    centre, spread = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    return (images / 255 - centre) / spread
