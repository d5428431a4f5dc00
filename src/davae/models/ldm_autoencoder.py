"""``AutoencoderKL`` whose first convolution has its own width, as LDM's encoder allows."""

from __future__ import annotations

from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


class LDMAutoencoderKL(AutoencoderKL):
    """An ``AutoencoderKL`` with ``stem_channels`` behind the encoder's first convolution.

    LDM (``ch``, ``ch_mult``) starts with ``ch`` channels and widens in the first residual block;
    ``AutoencoderKL`` starts with the width of its first level. The two agree where ``ch_mult`` begins with 1.

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
