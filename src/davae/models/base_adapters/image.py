"""Adapters of the image autoencoders that work out of the box, and the blocks and classes they need."""

import copy
import math
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from davae.models.base_adapters.adapter import BaseAdapter, Convolution, FeatureChain, register_adapter
from davae.models.base_adapters.blocks import with_memory_efficient_blocks
from davae.models.portable import OpenedWhole


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
        return with_memory_efficient_blocks(encoder)

    def joint_decoder(self, base: Any) -> nn.Module:
        """The decoder without ``conv_in``."""
        decoder = copy.deepcopy(base.decoder)
        decoder.conv_in = nn.Identity()
        return with_memory_efficient_blocks(decoder)

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
    """``AutoencoderKLFlux2``: an ``AutoencoderKL`` whose pipelines normalise latent patches with its batch norm."""

    def normalisation(self, base: Any) -> tuple[Tensor, Tensor]:
        """From the batch norm's statistics, averaged over the positions in a patch."""
        cells = math.prod(base.config.patch_size)
        mean = base.bn.running_mean.float().unflatten(0, (-1, cells))  # [C, p^2]: channel-major
        variance = base.bn.running_var.float().unflatten(0, (-1, cells))
        return mean.mean(dim=1), (variance.mean(dim=1) + base.config.batch_norm_eps).rsqrt()

    def pipeline_config(self, base: Any) -> dict[str, Any]:
        """The batch norm's epsilon and patch size."""
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
        """``conv_out`` plus the shortcut that averages consecutive features."""
        head = _numbers(base.encoder.conv_out)
        if base.encoder.out_shortcut:
            out, features = head.weight.shape[:2]
            head = head.plus_centre(_runs(out, features).T * (out / features))
        return head

    def decoder_stem(self, base: Any) -> Convolution | None:
        """``conv_in`` plus the shortcut that repeats each channel."""
        stem = _numbers(base.decoder.conv_in)
        if base.decoder.in_shortcut:
            features, channels = stem.weight.shape[:2]
            stem = stem.plus_centre(_runs(channels, features))
        return stem

    def pipeline_config(self, base: Any) -> dict[str, Any]:
        """SANA pipelines derive the compression from the length of ``encoder_block_out_channels``."""
        return {"encoder_block_out_channels": list(base.config.encoder_block_out_channels)}


class TinyAdapter(BaseAdapter):
    """``AutoencoderTiny`` (TAESD): deterministic latent, softly clamped to (-3, 3); images in [0, 1] internally."""

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
    """``[many, few]``: 1 where a row is among the column's ``many / few`` consecutive rows, else 0."""
    return torch.eye(few).repeat_interleave(many // few, dim=0)


class LDMAutoencoderKL(OpenedWhole, AutoencoderKL):
    """An ``AutoencoderKL`` whose encoder's first convolution has ``stem_channels`` output channels.

    LDM (``ch``, ``ch_mult``) starts with ``ch`` channels and widens in the first residual block;
    ``AutoencoderKL`` starts with the width of its first level. The two agree if ``ch_mult`` begins with 1.

    Args:
        stem_channels: ``ch``.

    The other arguments are ``AutoencoderKL``'s.
    """

    @register_to_config
    def __init__(
        self,
        stem_channels: int,
        down_block_types: tuple[str, ...],
        up_block_types: tuple[str, ...],
        block_out_channels: tuple[int, ...],
        layers_per_block: int = 2,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = False,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__(
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.encoder.conv_in = nn.Conv2d(3, stem_channels, kernel_size=3, padding=1)
        self.encoder.down_blocks[0].resnets[0] = ResnetBlock2D(
            in_channels=stem_channels,
            out_channels=block_out_channels[0],
            temb_channels=None,
            groups=norm_num_groups,
            eps=1e-6,
        )


for _class, _adapter in (
    (AutoencoderKL, KLAdapter()),
    (LDMAutoencoderKL, KLAdapter()),
    (AutoencoderKLFlux2, Flux2Adapter()),
    (AutoencoderDC, DCAdapter()),
    (AutoencoderTiny, TinyAdapter()),
):
    register_adapter(_class, _adapter)
