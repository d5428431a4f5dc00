"""What training a deep compression autoencoder needs to know of diffusers' models: their parts and shortcuts.

The network of DC-AE (Chen et al., 2024) is diffusers' ``AutoencoderDC``; nothing of it is written again here.
"""

from functools import wraps
from typing import Any, TypeAlias

from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from torch import Tensor, nn

from davae.models.portable import OpenedWhole

DeepAutoencoder: TypeAlias = AutoencoderDC | AutoencoderKL


class PlainAutoencoderDC(OpenedWhole, AutoencoderDC):
    """``AutoencoderDC`` without residual autoencoding: the ablation of Figure 4 in the paper.

    The same layers with the same parameters; only the shortcuts that have none (space-to-channel with a
    channel mean on the way down, channel repetition with channel-to-space on the way up, and those at both ends
    of the latent) are left out. Saved under this class's name: loaded as ``AutoencoderDC`` it would compute
    something else, so load it with this class.
    """

    # diffusers reads the arguments that a config may give from the signature
    @wraps(AutoencoderDC.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder.out_shortcut = self.decoder.in_shortcut = False
        self.register_to_config(encoder_out_shortcut=False, decoder_in_shortcut=False)
        for module in self.modules():
            if isinstance(module, (DCDownBlock2d, DCUpBlock2d)):
                module.shortcut = False


def latent_layers(model: DeepAutoencoder, stages: int) -> list[nn.Module]:
    """The middle of the network: the encoder's last and the decoder's first ``stages``, and what lies between.

    Args:
        stages: resolutions on each side of the latent, from 1.
    """
    encoder, decoder = model.encoder, model.decoder
    down, up = _filled(encoder.down_blocks), _decoder_stages(model)
    if isinstance(model, AutoencoderDC):
        between = [encoder.conv_out, decoder.conv_in]
    else:
        between = [encoder.mid_block, encoder.conv_norm_out, encoder.conv_out]
        between += [decoder.conv_in, decoder.mid_block]
    return [*down[-stages:], *between, *up[:stages]]


def head_layers(model: DeepAutoencoder, stages: int) -> list[nn.Module]:
    """The decoder's head: its last ``stages`` (0 for none), output norm and output convolution."""
    decoder, up = model.decoder, _decoder_stages(model)
    norm = decoder.norm_out if isinstance(model, AutoencoderDC) else decoder.conv_norm_out
    return [*up[len(up) - stages :], norm, decoder.conv_out]


def last_decoder_weight(model: DeepAutoencoder) -> Tensor:
    """Weight of the last convolution: the adaptive GAN weight compares gradients here."""
    return [m for m in model.decoder.conv_out.modules() if isinstance(m, nn.Conv2d)][-1].weight


def _decoder_stages(model: DeepAutoencoder) -> list[nn.Module]:
    """From the latent to the image; ``AutoencoderDC`` numbers them from the image."""
    blocks = _filled(model.decoder.up_blocks)
    return blocks[::-1] if isinstance(model, AutoencoderDC) else blocks


def _filled(blocks: nn.ModuleList) -> list[nn.Module]:
    """Without the stages that hold no layer: published DC-AE begins with such a one."""
    return [block for block in blocks if any(True for _ in block.parameters())]
