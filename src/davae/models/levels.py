"""The levels of a structured latent: ``[z, z_d1, z_d2, ...]``, where each prefix is an image of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models.base_adapters import BaseAdapter


@dataclass(frozen=True)
class Level:
    """One prefix of the latent that can be decoded.

    Args:
        number: 0 is the base alone.
        scale: resolution of its image per side, as a multiple of the base's.
        layout: its channels: ``C`` base channels, and the detail channels of this and all lower levels.
    """

    number: int
    scale: int
    layout: LatentLayout


class OnABase:
    """What stands on a base: the base VAE, or the level below."""

    base: Any
    base_compression: int
    scale: int

    @property
    def below(self) -> Self | None:
        """The autoencoder of the level below; None where that is the base VAE."""
        return self.base if isinstance(self.base, OnABase) else None  # type: ignore[return-value]

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent position and side, ``s * f``."""
        return self.scale * self.base_compression


class Levels(OnABase):
    """What an :class:`davae.AutoencoderDA` tells about its levels.

    A level is an ``AutoencoderDA`` whose base is the level below; the lowest stands on the base VAE.
    """

    adapter: BaseAdapter
    layout: LatentLayout
    trains_below: bool
    config: Any

    @property
    def levels(self) -> tuple[Level, ...]:
        """Every prefix that can be decoded, the base (level 0) first, the whole latent last."""
        if self.below is None:
            lower: tuple[Level, ...] = (Level(0, 1, LatentLayout(self.layout.base_channels, 0)),)
        else:
            lower = self.below.levels
        return (*lower, Level(len(lower), self.scale, self.layout))

    @property
    def base_vae(self) -> Any:
        """The pretrained VAE at the bottom."""
        return self.base if self.below is None else self.below.base_vae

    def at_level(self, number: int) -> Self:
        """The autoencoder of a level, 1 or higher. It is a part of this one, not a copy.

        Raises:
            DavaeError: there is no such level.
        """
        for level in self.autoencoders():
            if level.levels[-1].number == number:
                return level
        raise DavaeError(f"there is no level {number} of details: levels are 1 to {self.levels[-1].number}")

    def autoencoders(self) -> Iterator[Self]:
        """The autoencoders of all levels, lowest first, this one last."""
        if self.below is not None:
            yield from self.below.autoencoders()
        yield self

    @apply_forward_hook
    def decode_level(self, latent: Tensor, level: int) -> Tensor:
        """The image of one level, ``[B, 3, h * f * scale, w * f * scale]`` with that level's scale.

        Channels above the level are not looked at.

        Args:
            latent: in the pipelines' convention, ``[B, n, h, w]`` with at least the level's channels.
            level: 0 decodes the base channels with the untouched base VAE, the last level everything.

        Raises:
            DavaeError: no such level, too few channels, or the model was made without the decoder.
        """
        levels = self.levels
        if not 0 <= level < len(levels):
            raise DavaeError(f"there is no level {level}: levels are 0 to {levels[-1].number}")
        channels = levels[level].layout.channels
        if latent.shape[1] < channels:
            raise DavaeError(f"level {level} needs {channels} channels, the latent has {latent.shape[1]}")
        latent = latent[:, :channels]
        if level == levels[-1].number:
            return self.decode(latent).sample  # type: ignore[attr-defined]
        if not self.config.has_base_decoder:
            raise DavaeError(
                "this autoencoder was made without its base's decoder: only its last level can be decoded"
            )
        if self.below is not None:
            return self.below.decode_level(latent, level)
        return self._decode_base(latent)  # type: ignore[attr-defined]

    @apply_forward_hook
    @torch.no_grad()
    def decode_base(self, latent: Tensor) -> Tensor:
        """A preview, ``[B, 3, H / s, W / s]``: the untouched base VAE on the first ``C`` channels.

        Args:
            latent: in the pipelines' convention, ``[B, C + D, h, w]``, or its base part ``[B, C, h, w]``.

        Raises:
            DavaeError: the model has no base decoder.
        """
        return self.decode_level(latent, 0)

    def drop_base_decoder(self) -> None:
        """Forget the decoders of all levels below: :meth:`decode` needs none of them.

        Saves their memory and their place in saved files; previews and lower levels cannot be decoded any more.
        """
        self.register_to_config(has_base_decoder=False)  # type: ignore[attr-defined]
        self.adapter.drop_decoder(self.base)

    def train_levels(self, *, together: bool) -> None:
        """Choose what learns: this level alone (the start), or all levels together. The base VAE never does.

        Raises:
            DavaeError: all are to learn, but the lower levels' decoders were dropped.
        """
        if self.below is not None:
            if together and not self.config.has_base_decoder:
                raise DavaeError("the lower levels have no decoders left: they cannot be trained")
            self.trains_below = together
            self.below.train_levels(together=together)
        self.requires_grad_(True)  # type: ignore[attr-defined]
        self.train(self.training)  # type: ignore[attr-defined]
