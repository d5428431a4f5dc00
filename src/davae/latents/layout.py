"""Where base and detail channels are in a structured latent, and how many tokens it makes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from davae.errors import DavaeError


@dataclass(frozen=True)
class LatentLayout:
    """The structured latent ``[z, z_d]``: ``C`` base channels first, ``D`` detail channels after.

    This is the one place that defines the order.

    Args:
        base_channels: ``C``, channels of the base VAE's latent, at least 1.
        detail_channels: ``D``, channels of the detail latent; 0 for a base model, whose latent is ``z``
            alone.

    Raises:
        DavaeError: a count is too small or not an integer.
    """

    base_channels: int
    detail_channels: int

    def __post_init__(self) -> None:
        for name, least in (("base_channels", 1), ("detail_channels", 0)):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise DavaeError(f"{name} must be at least {least}, not {count}")

    @property
    def channels(self) -> int:
        """``C + D``."""
        return self.base_channels + self.detail_channels

    @property
    def base(self) -> slice:
        """Channels of the base latent."""
        return slice(0, self.base_channels)

    @property
    def detail(self) -> slice:
        """Channels of the detail latent."""
        return slice(self.base_channels, self.channels)

    @property
    def group_size(self) -> int:
        """``r = D / C``: how many consecutive detail channels belong to one base channel.

        Raises:
            DavaeError: ``D`` is not a multiple of ``C``.
        """
        if self.detail_channels % self.base_channels:
            raise DavaeError(
                f"{self.detail_channels} detail channels cannot be divided into {self.base_channels} equal groups"
            )
        return self.detail_channels // self.base_channels

    def split(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, C + D, h, w]`` to base ``[B, C, h, w]`` and detail ``[B, D, h, w]``.

        Raises:
            DavaeError: the latent has another number of channels.
        """
        if latent.shape[1] != self.channels:
            raise DavaeError(
                f"the latent has {latent.shape[1]} channels, expected {self.channels} "
                f"({self.base_channels} base + {self.detail_channels} detail)"
            )
        return latent[:, self.base], latent[:, self.detail]

    def join(self, z: Tensor, z_d: Tensor) -> Tensor:
        """Base ``[B, C, h, w]`` and detail ``[B, D, h, w]`` to ``[B, C + D, h, w]``.

        Raises:
            DavaeError: a part has another number of channels, or the parts differ in batch or grid.
        """
        for name, part, expected in (("base", z, self.base_channels), ("detail", z_d, self.detail_channels)):
            if part.shape[1] != expected:
                raise DavaeError(f"the {name} latent has {part.shape[1]} channels, expected {expected}")
        if z.shape[0] != z_d.shape[0] or z.shape[2:] != z_d.shape[2:]:
            raise DavaeError(
                f"base latent {tuple(z.shape)} and detail latent {tuple(z_d.shape)} differ in batch or grid"
            )
        return torch.cat([z, z_d], dim=1)


def token_count(height: int, width: int, *, spatial_compression: int, patch_size: int = 1) -> int:
    """Tokens that a transformer sees for an image of ``height`` by ``width`` pixels.

    Args:
        height, width: image size in pixels.
        spatial_compression: pixels per latent cell and side (``f``, or ``s * f`` when upgraded).
        patch_size: latent cells per token and side.

    Raises:
        DavaeError: a side is not a multiple of ``spatial_compression * patch_size``, or a number is below 1.
    """
    if min(height, width, spatial_compression, patch_size) < 1:
        raise DavaeError(
            f"{height} x {width} pixels, compression {spatial_compression} and patch {patch_size} must be at least 1"
        )
    side = spatial_compression * patch_size
    if height % side or width % side:
        raise DavaeError(
            f"{height} x {width} pixels do not divide into tokens of {side} x {side} "
            f"(compression {spatial_compression} times patch {patch_size}): use multiples of {side}"
        )
    return (height // side) * (width // side)
