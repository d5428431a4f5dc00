"""Adapters of autoencoders derived from video models: Qwen-Image's, which treats an image as a video of one frame.

In a causal convolution over time a single frame meets only the last slice of the kernel, because the frames before it
are zeros. The branches of the upgraded autoencoder are image networks built from these slices: the same function with
about a third of the weights, without the parts that only act on later frames.
"""

import copy
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLQwenImage21
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageResample
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import QwenImage21CausalConv3d, QwenImage21Resample
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.models.base_adapters.adapter import BaseAdapter, Convolution, Stages, register_adapter


class FrameConv2d(nn.Conv2d):
    """What a causal convolution over time does to a single frame ``[B, C, 1, H, W]``."""

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        """``[B, C, 1, H, W]`` to ``[B, O, 1, H', W']``."""
        return super().forward(x.squeeze(2)).unsqueeze(2)


class FrameEncoder(Stages):
    """An encoder of single frames as one of images; a missing alpha channel is filled with 1 (opaque)."""

    def __init__(self, network: Any, channels: int) -> None:
        super().__init__()
        self.network = network
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to features ``[B, F, h, w]``."""
        opaque = self.channels - images.shape[1]
        if opaque:
            images = torch.cat([images, torch.ones_like(images[:, :opaque])], dim=1)
        x = self.through([*self.network.down_blocks, self.network.mid_block], self.network.conv_in(images.unsqueeze(2)))
        return self.network.nonlinearity(self.network.norm_out(x)).squeeze(2)


class FrameDecoder(Stages):
    """A decoder of single frames as one of images; only the three colour channels of its output are kept."""

    def __init__(self, network: Any, **first: bool) -> None:
        super().__init__()
        self.network = network
        self.first = first  # block arguments that mark the first frame

    def forward(self, features: Tensor) -> Tensor:
        """``[B, F, h, w]`` to images ``[B, 3, H, W]``."""
        blocks = [partial(block, **self.first) for block in self.network.up_blocks]
        x = self.through([self.network.mid_block, *blocks], features.unsqueeze(2))
        x = self.network.conv_out(self.network.nonlinearity(self.network.norm_out(x)))
        return x.squeeze(2)[:, :3]


class QwenImageAdapter(BaseAdapter):
    """``AutoencoderKLQwenImage``: f8, with the latent's per-channel means and standard deviations in the config."""

    def detail_encoder(self, base: Any) -> nn.Module:
        """The encoder without ``conv_out``: after its norm and activation."""
        _check_no_patches(base)
        encoder = _of_single_frames(base.encoder, without="conv_out")
        return FrameEncoder(encoder, encoder.conv_in.in_channels)

    def joint_decoder(self, base: Any) -> nn.Module:
        """The decoder without ``conv_in``."""
        return FrameDecoder(_of_single_frames(base.decoder, without="conv_in"))

    def encode(self, base: Any, images: Tensor) -> Tensor:
        """The posterior's mode, ``[B, C, h, w]``."""
        opaque = base.encoder.conv_in.in_channels - images.shape[1]
        if opaque:
            images = torch.cat([images, torch.ones_like(images[:, :opaque])], dim=1)
        return base.encode(images.unsqueeze(2)).latent_dist.mode().squeeze(2)

    def decode(self, base: Any, z: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]``; the base itself clamps them to [-1, 1]."""
        return base.decode(z.unsqueeze(2)).sample.squeeze(2)[:, :3]

    def image_channels(self, base: Any) -> tuple[int, int]:
        """An alpha channel, if the base has one, is added and dropped by this adapter."""
        taken = int(base.encoder.conv_in.in_channels)
        return (3, 3) if taken == 4 else (taken, taken)

    def latent_channels(self, base: Any) -> int:
        """``z_dim``."""
        return int(base.config.z_dim)

    def encoder_head(self, base: Any) -> Convolution | None:
        """``conv_out`` and the quant convolution, the mean's half."""
        quant = _on_one_frame(base.quant_conv)
        head = _on_one_frame(base.encoder.conv_out).then(quant.weight[:, :, 0, 0], quant.bias)
        channels = self.latent_channels(base)
        return Convolution(head.weight[:channels], head.bias[:channels])

    def decoder_stem(self, base: Any) -> Convolution | None:
        """``conv_in`` after the post-quant convolution."""
        post = _on_one_frame(base.post_quant_conv)
        return _on_one_frame(base.decoder.conv_in).after(post.weight[:, :, 0, 0], post.bias)


class QwenImage21Adapter(QwenImageAdapter):
    """``AutoencoderKLQwenImage21``: f16, with an alpha channel that the upgraded model sets to 1."""

    def joint_decoder(self, base: Any) -> nn.Module:
        """The decoder without ``conv_in``; its shortcuts drop the frames before the first."""
        return FrameDecoder(_of_single_frames(base.decoder, without="conv_in"), first_chunk=True)


def _check_no_patches(base: Any) -> None:
    patch = base.config.get("patch_size")
    if patch not in (None, 1):
        raise DavaeError(
            f"{type(base).__name__} with patch_size {patch} is not supported: its networks see patches, not pixels"
        )


def _of_single_frames(network: nn.Module, *, without: str) -> Any:
    """A copy without layer ``without`` that computes the same for a single frame and has no weights for others."""
    network = copy.deepcopy(network)
    setattr(network, without, nn.Identity())
    for module in list(network.modules()):
        if isinstance(module, QwenImageResample | QwenImage21Resample) and module.mode.endswith("3d"):
            module.mode = module.mode.replace("3d", "2d")
            del module.time_conv
        if isinstance(module, nn.Upsample):  # the same for integer factors, and supported by ONNX
            module.mode = module.mode.removesuffix("-exact")
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, QwenImageCausalConv3d | QwenImage21CausalConv3d):
                setattr(parent, name, _frame_convolution(child))
    return network


def _frame_convolution(conv: Any) -> FrameConv2d:
    weight = conv.weight[:, :, -1] if conv.weight.ndim == 5 else conv.weight
    left, _, top, _ = conv._padding[:4]  # symmetric in space; only the padding in time is not
    frame = FrameConv2d(
        conv.in_channels,
        conv.out_channels,
        tuple(weight.shape[-2:]),
        stride=conv.stride[-2:],
        padding=(top, left),
        device=weight.device,
        dtype=weight.dtype,
    )
    frame.load_state_dict({"weight": weight, "bias": conv.bias})
    return frame


def _on_one_frame(conv: Any) -> Convolution:
    weight = conv.weight[:, :, -1] if conv.weight.ndim == 5 else conv.weight
    return Convolution(weight.detach().float(), conv.bias.detach().float())


register_adapter(AutoencoderKLQwenImage, QwenImageAdapter())
register_adapter(AutoencoderKLQwenImage21, QwenImage21Adapter())
