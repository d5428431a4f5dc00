"""What training a deep compression autoencoder needs to know about diffusers' models: their parts and shortcuts.

DC-AE (Chen et al. 2024, arXiv 2410.10733) and DC-AE 1.5 (arXiv 2508.00413) themselves are diffusers' ``AutoencoderDC``.
"""

from functools import wraps
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.models.portable import OpenedWhole

DeepAutoencoder: TypeAlias = AutoencoderDC | AutoencoderKL


class PlainAutoencoderDC(OpenedWhole, AutoencoderDC):
    """``AutoencoderDC`` without residual autoencoding: the ablation of Figure 4 in the paper.

    The layers and parameters are the same; only the parameter-free shortcuts (space-to-channel with a
    channel mean in the encoder, channel repetition with channel-to-space in the decoder, and those on both sides
    of the latent) are left out. Load it with this class: as ``AutoencoderDC`` it would compute something else.
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


def first_channels(model: AutoencoderDC, count: int) -> AutoencoderDC:
    """The autoencoder cut to the first ``count`` channels of its latent, as DC-AE 1.5 is meant to be cut.

    It encodes to those channels, and decodes them as the whole one decodes them beside zeros. The scaling factor stays
    that of all channels.

    Args:
        model: without shortcuts at the latent.
        count: channels to keep, at least 1.

    Raises:
        DavaeError: it has such shortcuts, or not so many channels.
    """
    config = model.config
    if config.encoder_out_shortcut or config.decoder_in_shortcut:
        raise DavaeError("an AutoencoderDC with shortcuts at the latent cannot be cut: they mix groups of channels")
    if not 0 < count <= config.latent_channels:
        raise DavaeError(f"a latent of {config.latent_channels} channels has no first {count}: take 1 to as many")
    with torch.device("meta"):
        cut: AutoencoderDC = type(model).from_config({**config, "latent_channels": count})
    state = model.state_dict()
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
        state[name] = state[name][:count]
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"][:, :count]
    cut.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return cut.train(model.training)


def latent_layers(model: DeepAutoencoder, stages: int) -> list[nn.Module]:
    """The layers around the latent: the encoder's last and the decoder's first ``stages``, and those in between.

    Args:
        model: the autoencoder.
        stages: number of resolutions on each side of the latent; 0 for the layers in between alone.
    """
    encoder, decoder = model.encoder, model.decoder
    down, up = _filled(encoder.down_blocks), _decoder_stages(model)
    if isinstance(model, AutoencoderDC):
        between = [encoder.conv_out, decoder.conv_in]
    else:
        between = [encoder.mid_block, encoder.conv_norm_out, encoder.conv_out]
        between += [decoder.conv_in, decoder.mid_block]
    return [*down[len(down) - stages :], *between, *up[:stages]]


def head_layers(model: DeepAutoencoder, stages: int) -> list[nn.Module]:
    """The decoder's head: its last ``stages`` (0 for none), output norm and output convolution."""
    decoder, up = model.decoder, _decoder_stages(model)
    norm = decoder.norm_out if isinstance(model, AutoencoderDC) else decoder.conv_norm_out
    return [*up[len(up) - stages :], norm, decoder.conv_out]


def last_decoder_weight(model: DeepAutoencoder) -> Tensor:
    """Weight of the decoder's last convolution, where the adaptive GAN weight compares gradients."""
    return [m for m in model.decoder.conv_out.modules() if isinstance(m, nn.Conv2d)][-1].weight


def _decoder_stages(model: DeepAutoencoder) -> list[nn.Module]:
    """Decoder stages from the latent to the image; ``AutoencoderDC`` numbers them from the image."""
    blocks = _filled(model.decoder.up_blocks)
    return blocks[::-1] if isinstance(model, AutoencoderDC) else blocks


def _filled(blocks: nn.ModuleList) -> list[nn.Module]:
    """Stages that have parameters; published DC-AE models begin with one that has none."""
    return [block for block in blocks if any(True for _ in block.parameters())]
