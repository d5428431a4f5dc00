"""An :class:`davae.AutoencoderDA` as the base of another one: how a further level of details finds its start."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.latents import LatentLayout, grouped_mean
from davae.models.base_adapters.adapter import BaseAdapter, Convolution


class NestedAdapter(BaseAdapter):
    """The level below: its latent is raw, ``[z, z_d1]`` as its own networks see it before normalisation."""

    def detail_encoder(self, base: Any) -> nn.Module:
        """A copy of the detail encoder below; it keeps its compression ``f``."""
        return copy.deepcopy(base.detail_encoder)

    def joint_decoder(self, base: Any) -> nn.Module:
        """A copy of the joint decoder below."""
        if base.joint_decoder is None:
            raise DavaeError("the autoencoder has lost the joint decoder of a level: load it as it was trained")
        return copy.deepcopy(base.joint_decoder)

    def network_adapter(self, base: Any) -> BaseAdapter:
        """That of the base VAE, whose networks all levels are copies of."""
        return base.adapter.network_adapter(base.base)

    def image_channels(self, base: Any) -> tuple[int, int]:
        """Those of the base VAE."""
        return base.adapter.image_channels(base.base)

    def latent_layout(self, base: Any) -> LatentLayout:
        """Its base and detail channels."""
        return base.layout

    def latent_channels(self, base: Any) -> int:
        """``C`` and the details of all levels below."""
        return base.layout.channels

    def scale(self, base: Any) -> int:
        """Its resolution per side, as a multiple of the base VAE's."""
        return base.scale

    def encode(self, base: Any, images: Tensor) -> Tensor:
        """Raw ``[z, z_d1]``, posterior means."""
        return base.layout.join(base.encode_base(images), base.encode_details(images).mean)

    def decode(self, base: Any, z: Tensor) -> Tensor:
        """Images from raw ``[z, z_d1]``."""
        return base.decode_structured(*base.layout.split(z))

    def normalisation(self, base: Any) -> tuple[Tensor, Tensor]:
        """That of the base VAE; raw details are on the scale of the normalised base already (alignment)."""
        shift, scale = base.adapter.normalisation(base.base)
        added = shift.new_zeros(base.own_layout.detail_channels)
        return torch.cat([shift, added]), torch.cat([scale, added + 1.0])

    def drop_decoder(self, base: Any) -> None:
        """Its joint decoder, and the decoders below it."""
        base.up = base.joint_decoder = None
        base.drop_base_decoder()

    def encoder_head(self, base: Any) -> Convolution | None:
        """An estimate of the raw base latent: the grouped mean of the details below (alignment ties them)."""
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
        """As of the base VAE."""
        return base.adapter.pipeline_config(base.base)

    def pipeline_modules(self, base: Any, detail_channels: int) -> dict[str, nn.Module]:
        """As of the base VAE, with the details of all levels."""
        return base.adapter.pipeline_modules(base.base, base.own_layout.detail_channels + detail_channels)
