"""Bicubic resizing of images."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Resize ``[B, 3, h, w]`` bicubically with antialiasing, as Pillow does; unchanged if the size already fits."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode="bicubic", antialias=True, align_corners=False)


def upscaled(small: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Images ``[B, 3, h, w]`` enlarged bicubically to ``size`` (height, width) and clamped to [-1, 1], float32.

    Without antialiasing, with which torch uses another bicubic kernel even when enlarging.
    """
    return F.interpolate(small.float(), size=size, mode="bicubic", align_corners=False).clamp(-1, 1)


def reduced(images: Tensor, factor: int) -> Tensor:
    """``[B, 3, H, W]`` to ``[B, 3, H // factor, W // factor]``, bicubic and antialiased."""
    return resize_bicubic(images, images.shape[-2] // factor, images.shape[-1] // factor)


def reduced_to(images: Tensor, side: int) -> Tensor:
    """``[B, 3, S, S]`` to ``[B, 3, side, side]``, bicubic and antialiased."""
    if images.shape[-1] % side == 0:
        return reduced(images, images.shape[-1] // side)
    return resize_bicubic(images, side, side)
