"""The one way in which small images are enlarged to stand beside large ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def upscaled(small: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Images ``[B, 3, h, w]`` enlarged bicubically to ``size`` (height, width) and clamped to [-1, 1], float32.

    Without antialiasing: torch's takes another kernel also where nothing is reduced.
    """
    return F.interpolate(small.float(), size=size, mode="bicubic", align_corners=False).clamp(-1, 1)
