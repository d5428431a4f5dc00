"""Adapters of the base autoencoders that work out of the box."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from torch import Tensor, nn

from davae.models.base_adapters import BaseAdapter, Convolution, FeatureChain, register_adapter
from davae.models.frugal_blocks import with_frugal_blocks
from davae.models.ldm_autoencoder import LDMAutoencoderKL


class _Rescale(nn.Module):
    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _OverChannels(nn.Module):
    """Applies a norm of the last dimension to the channels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class KLAdapter(BaseAdapter):
    """``AutoencoderKL``: SD, SDXL, SD3, FLUX, VA-VAE; with and without quant convolutions."""

    def detail_encoder(self, base: Any) -> nn.Module:
        """The encoder without ``conv_out``: after its norm and activation."""
        encoder = copy.deepcopy(base.encoder)
        encoder.conv_out = nn.Identity()
        return with_frugal_blocks(encoder)

    def joint_decoder(self, base: Any) -> nn.Module:
        """The decoder without ``conv_in``."""
        decoder = copy.deepcopy(base.decoder)
        decoder.conv_in = nn.Identity()
        return with_frugal_blocks(decoder)

    def encoder_head(self, base: Any) -> Convolution | None:
        """``conv_out`` and the quant convolution, the mean's half."""
        head = _numbers(base.encoder.conv_out)
        if base.quant_conv is not None:
            head = head.then(*_matrix(base.quant_conv))
        channels = self.latent_channels(base)
        return Convolution(head.weight[:channels], head.bias[:channels])

    def decoder_stem(self, base: Any) -> Convolution | None:
        """``conv_in`` after the post-quant convolution."""
        stem = _numbers(base.decoder.conv_in)
        return stem if base.post_quant_conv is None else stem.after(*_matrix(base.post_quant_conv))


class Flux2Adapter(KLAdapter):
    """``AutoencoderKLFlux2``: ``AutoencoderKL`` whose pipelines normalise patches with its batch norm."""

    def normalisation(self, base: Any) -> tuple[Tensor, Tensor]:
        """From the batch norm's statistics, averaged over the positions in a patch."""
        cells = math.prod(base.config.patch_size)
        mean = base.bn.running_mean.float().unflatten(0, (-1, cells))  # [C, p^2]: channel-major
        variance = base.bn.running_var.float().unflatten(0, (-1, cells))
        return mean.mean(dim=1), (variance.mean(dim=1) + base.config.batch_norm_eps).rsqrt()

    def pipeline_config(self, base: Any) -> dict[str, Any]:
        """What the batch norm needs."""
        return {"batch_norm_eps": base.config.batch_norm_eps, "patch_size": list(base.config.patch_size)}

    def pipeline_modules(self, base: Any, detail_channels: int) -> dict[str, nn.Module]:
        """The batch norm, extended by entries that leave the (already normalised) details as they are."""
        eps, cells = base.config.batch_norm_eps, math.prod(base.config.patch_size)
        details = torch.zeros(detail_channels * cells)
        norm = nn.BatchNorm2d(len(base.bn.running_mean) + len(details), eps=eps, affine=False)
        norm.running_mean = torch.cat([base.bn.running_mean, details.to(base.bn.running_mean)])
        norm.running_var = torch.cat([base.bn.running_var, (details + 1.0 - eps).to(base.bn.running_var)])
        return {"bn": norm}


class DCAdapter(BaseAdapter):
    """``AutoencoderDC`` (SANA): deterministic latent, shortcuts around the layers at both latent ends."""

    def detail_encoder(self, base: Any) -> nn.Module:
        """The encoder without ``conv_out`` and its shortcut."""
        return FeatureChain([base.encoder.conv_in, *base.encoder.down_blocks])

    def joint_decoder(self, base: Any) -> nn.Module:
        """The decoder without ``conv_in`` and its shortcut."""
        decoder = base.decoder
        end = [_OverChannels(decoder.norm_out), decoder.conv_act, decoder.conv_out]
        return FeatureChain([*reversed(decoder.up_blocks), *end])

    def encoder_head(self, base: Any) -> Convolution | None:
        """``conv_out`` and the shortcut that averages consecutive features."""
        head = _numbers(base.encoder.conv_out)
        if base.encoder.out_shortcut:
            out, features = head.weight.shape[:2]
            head = head.plus_centre(_runs(out, features).T * (out / features))
        return head

    def decoder_stem(self, base: Any) -> Convolution | None:
        """``conv_in`` and the shortcut that repeats channels in a row."""
        stem = _numbers(base.decoder.conv_in)
        if base.decoder.in_shortcut:
            features, channels = stem.weight.shape[:2]
            stem = stem.plus_centre(_runs(channels, features))
        return stem

    def pipeline_config(self, base: Any) -> dict[str, Any]:
        """SANA pipelines count ``encoder_block_out_channels``."""
        return {"encoder_block_out_channels": list(base.config.encoder_block_out_channels)}


class TinyAdapter(BaseAdapter):
    """``AutoencoderTiny`` (TAESD): deterministic latent, softly clamped to (-3, 3); [0, 1] inside."""

    def detail_encoder(self, base: Any) -> nn.Module:
        """The encoder without its last convolution."""
        return FeatureChain([_Rescale(0.5, 0.5), *base.encoder.layers[:-1]])

    def joint_decoder(self, base: Any) -> nn.Module:
        """The decoder without its first convolution and without the clamp of the latent."""
        return FeatureChain([*base.decoder.layers[1:], _Rescale(2.0, -1.0)])

    def bound(self, z: Tensor) -> Tensor:
        """``3 tanh(z / 3)``."""
        return torch.tanh(z / 3) * 3

    def encoder_head(self, base: Any) -> Convolution | None:
        """The encoder's last convolution."""
        return _numbers(base.encoder.layers[-1])

    def decoder_stem(self, base: Any) -> Convolution | None:
        """The decoder's first convolution."""
        return _numbers(base.decoder.layers[0])


def _numbers(conv: nn.Conv2d) -> Convolution:
    bias = conv.bias if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)
    return Convolution(conv.weight.detach().float(), bias.detach().float())


def _matrix(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution as matrix ``[out, in]`` and offset ``[out]``."""
    numbers = _numbers(conv)
    return numbers.weight[:, :, 0, 0], numbers.bias


def _runs(few: int, many: int) -> Tensor:
    """``[many, few]``: 1 where a row belongs to the run of ``many / few`` consecutive rows of that column."""
    return torch.eye(few).repeat_interleave(many // few, dim=0)


for _class, _adapter in (
    (AutoencoderKL, KLAdapter()),
    (LDMAutoencoderKL, KLAdapter()),
    (AutoencoderKLFlux2, Flux2Adapter()),
    (AutoencoderDC, DCAdapter()),
    (AutoencoderTiny, TinyAdapter()),
):
    register_adapter(_class, _adapter)
