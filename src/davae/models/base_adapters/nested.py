"""Adapter for an :class:`davae.AutoencoderDA` as the base of another one, with a further level of details."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.latents import LatentLayout, grouped_mean
from davae.models.base_adapters.adapter import BaseAdapter, Convolution


class NestedAdapter(BaseAdapter):
    """The level below; its latent is the raw ``[z, z_d1]``, without the normalisation of encode and decode."""

    def detail_encoder(self, base: Any) -> nn.Module:
        """A copy of the detail encoder below, with the same compression ``f``."""
        return copy.deepcopy(base.detail_encoder)

    def joint_decoder(self, base: Any) -> nn.Module:
        """A copy of the joint decoder below."""
        if base.joint_decoder is None:
            raise DavaeError("the joint decoder of a lower level was dropped: load the autoencoder from before that")
        return copy.deepcopy(base.joint_decoder)

    def network_adapter(self, base: Any) -> BaseAdapter:
        """That of the base VAE, whose networks every level copies."""
        return base.adapter.network_adapter(base.base)

    def image_channels(self, base: Any) -> tuple[int, int]:
        """Those of the base VAE."""
        return base.adapter.image_channels(base.base)

    def latent_layout(self, base: Any) -> LatentLayout:
        """The layout of all levels below."""
        return base.layout

    def latent_channels(self, base: Any) -> int:
        """``C`` and the details of all levels below."""
        return base.layout.channels

    def scale(self, base: Any) -> int:
        """Resolution of its images per side as a multiple of the base VAE's."""
        return base.scale

    def encode(self, base: Any, images: Tensor) -> Tensor:
        """Raw ``[z, z_d1]`` of posterior means, ``[B, C + D, h, w]``."""
        return base.layout.join(base.encode_base(images), base.encode_details(images).mean)

    def decode(self, base: Any, z: Tensor) -> Tensor:
        """Images from raw ``[z, z_d1]``."""
        return base.decode_structured(*base.layout.split(z))

    def normalisation(self, base: Any) -> tuple[Tensor, Tensor]:
        """That of the base VAE; on the details the identity, since alignment already gives them the scaled range."""
        shift, scale = base.adapter.normalisation(base.base)
        added = shift.new_zeros(base.own_layout.detail_channels)
        return torch.cat([shift, added]), torch.cat([scale, added + 1.0])

    def drop_decoder(self, base: Any) -> None:
        """Remove its joint decoder and the decoders below it."""
        base.up = base.joint_decoder = None
        base.drop_base_decoder()

    def encoder_head(self, base: Any) -> Convolution | None:
        """An estimate of the raw base latent: the grouped mean of the details below, which alignment ties to it.

        None for a strided down block, which knows no such mean at every feature.
        """
        if base.down.method == "stride":
            return None
        means = base.own_layout.detail_channels // base.down.factor**2  # convolution rows that serve means alone
        if not means:
            return None
        rows = torch.eye(base.down.conv.out_channels)[:, :means].repeat_interleave(base.down.factor**2, dim=0)
        rows = rows[: base.own_layout.detail_channels]  # [D, means]
        channels = base.layout.base_channels
        matrix = grouped_mean(rows.T[:, :, None, None], channels)[:, :, 0, 0].T  # [C, means]
        weight, bias = base.down.conv.weight.detach().float(), base.down.conv.bias.detach().float()
        shift, scale = (values[:channels] for values in base.base_affine(weight.device))
        matrix = matrix.to(weight) / scale[:, None]
        return Convolution(weight[:means], bias[:means]).then(matrix, shift)

    def pipeline_config(self, base: Any) -> dict[str, Any]:
        """Those of the base VAE."""
        return base.adapter.pipeline_config(base.base)

    def pipeline_modules(self, base: Any, detail_channels: int) -> dict[str, nn.Module]:
        """Those of the base VAE, for the details of all levels."""
        return base.adapter.pipeline_modules(base.base, base.own_layout.detail_channels + detail_channels)
