"""Images as feature networks want them. The rule is part of every metric: another one gives another number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def to_bytes(images: Tensor) -> Tensor:
    """``[B, 3, H, W]`` in [-1, 1] to whole numbers 0..255, still float32: what an image file would hold."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()


def resize_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, as Pillow does it; images of the right size stay as they are."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode="bicubic", antialias=True, align_corners=False)


def resize_tensorflow1(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear as TensorFlow 1 had it inside the Inception graph of FID: output pixel i lies at ``i * in / out``.

    No half-pixel shift and no antialiasing; published Fréchet distances contain both flaws.
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
    """0..255 to ``(x / 255 - mean) / std`` a channel."""
    centre, spread = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    return (images / 255 - centre) / spread
