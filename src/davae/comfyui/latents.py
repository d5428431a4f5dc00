"""What the nodes compute with an autoencoder, without ComfyUI.

Latents are ComfyUI's, those of diffusers' pipelines before scaling: ``[B, C + D, h, w]``, base channels first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.models import AutoencoderDA

Shown = Literal["details", "decoder alone", "base"]
SHOWN = ("details", "decoder alone", "base")


class Coder(nn.Module):
    """An autoencoder with the two methods that ComfyUI's ``VAE`` calls."""

    def __init__(self, model: AutoencoderDA) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents ``[B, C + D, h, w]``, the mode, of images ``[B, 3, H, W]`` in [-1, 1]."""
        return self.model.encode(images[:, :3]).latent_dist.mode()

    @torch.no_grad()
    def decode(self, latents: Tensor, shown: Shown = "details", **_: Any) -> Tensor:
        """Images ``[B, 3, H, W]``, about in [-1, 1].

        Args:
            latents: ``[B, C + D, h, w]``.
            shown: ``"details"``: the whole latent; ``"decoder alone"``: the same size from the base channels, without
                details; ``"base"``: the base autoencoder's image, ``s`` times smaller per side.

        Raises:
            DavaeError: another number of channels, or no base decoder.
        """
        layout = self.model.layout
        if latents.shape[1] != layout.channels:
            raise DavaeError(
                f"this latent has {latents.shape[1]} channels, and the autoencoder {layout.channels} "
                f"({layout.base_channels} base, {layout.detail_channels} detail): start from 'DA-VAE Empty Latent' or "
                "'DA-VAE Encode' with the same autoencoder, and sample with its own transformer"
            )
        if shown == "base":
            return self.model.decode_base(latents)
        if shown == "decoder alone":
            return self.model.decode_alone(layout.split(latents)[0])
        return self.model.decode(latents).sample

    @contextmanager
    def tiles(self, side: int) -> Iterator[None]:
        """In the block images are coded in tiles of ``side`` pixels, rounded down to whole positions; 0: whole.

        Tiles share the statistics of the whole image, so they do not differ in colour.
        """
        if side:
            unit = self.model.spatial_compression
            self.model.enable_tiling(max(side // unit, 4) * unit, 0.25)
        try:
            yield
        finally:
            self.model.disable_tiling()


def empty_latent(model: AutoencoderDA, width: int, height: int, batch: int) -> Tensor:
    """Zeros ``[B, C + D, h, w]`` for an image of that many pixels.

    Raises:
        DavaeError: sides that are not multiples of the compression.
    """
    unit = model.spatial_compression
    if width % unit or height % unit:
        near = " x ".join(str(max(round(side / unit), 1) * unit) for side in (width, height))
        raise DavaeError(f"{width} x {height} pixels: sides must be multiples of {unit}, such as {near}")
    return torch.zeros(batch, model.layout.channels, height // unit, width // unit)
