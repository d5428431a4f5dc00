"""Small random bases of every supported class, all with compression 4."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderTiny,
    ModelMixin,
)

KL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 16, 16),
    "latent_channels": 4,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 32,
}
DC: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 16),
    "decoder_block_out_channels": (8, 16, 16),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
    "decoder_act_fns": ("relu", "relu", "silu"),
    "scaling_factor": 0.4,
}
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
}
QWEN: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "latents_std": [1.0, 2.0, 0.5, 1.5],
}
NAMES = ("kl", "kl_plain", "kl_lists", "flux2", "dc", "tiny", "qwen", "qwen21")


def make_base(name: str) -> ModelMixin:
    """A base with random weights, the same at every call."""
    torch.manual_seed(NAMES.index(name))
    if name == "kl":
        base = AutoencoderKL(**KL, scaling_factor=0.7, shift_factor=0.1)
    elif name == "kl_plain":
        base = AutoencoderKL(**KL, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.7)
    elif name == "kl_lists":
        base = AutoencoderKL(
            **KL, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5], scaling_factor=0.5
        )
    elif name == "flux2":
        base = AutoencoderKLFlux2(**KL)
        base.bn.running_mean.normal_()
        base.bn.running_var.uniform_(0.5, 2.0)
    elif name == "dc":
        base = AutoencoderDC(**DC)
    elif name == "qwen":
        base = AutoencoderKLQwenImage(**QWEN)
    elif name == "qwen21":
        base = AutoencoderKLQwenImage21(**QWEN, decoder_base_dim=8, scale_factor_spatial=4)
    else:
        base = AutoencoderTiny(**TINY)
    return base.eval()


def raw_latent(base: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    """What the base itself gives for images at base resolution."""
    if isinstance(base, AutoencoderKLQwenImage21):  # four channels, the last one opacity
        images = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
    if isinstance(base, AutoencoderKLQwenImage | AutoencoderKLQwenImage21):
        return base.encode(images[:, :, None]).latent_dist.mean[:, :, 0]
    output = base.encode(images)
    if isinstance(base, AutoencoderDC):
        return output.latent
    return output.latents if isinstance(base, AutoencoderTiny) else output.latent_dist.mean


def raw_decode(base: ModelMixin, z: torch.Tensor) -> torch.Tensor:
    """The image, three channels, that the base itself makes of its raw latent."""
    if isinstance(base, AutoencoderKLQwenImage | AutoencoderKLQwenImage21):
        return base.decode(z[:, :, None]).sample[:, :3, 0]
    return base.decode(z).sample
