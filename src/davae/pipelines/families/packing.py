"""Latents packed two by two, as FLUX and Qwen-Image feed them to their transformers."""

from __future__ import annotations

from torch import Tensor

from davae.errors import DavaeError


def pack(latent: Tensor) -> Tensor:
    """``[B, C, h, w]`` to tokens ``[B, h/2 * w/2, C * 4]``, row by row, channel slowest within a token."""
    batch, channels, height, width = latent.shape
    if height % 2 or width % 2:
        raise DavaeError(
            f"a latent of {height} x {width} cannot be packed two by two: choose another resolution"
        )
    split = latent.view(batch, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse: ``[B, h/2 * w/2, C * 4]`` to ``[B, C, h, w]``."""
    batch, _, features = tokens.shape
    split = tokens.view(batch, height // 2, width // 2, features // 4, 2, 2)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)
