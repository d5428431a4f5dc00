"""Small transformers with every weight random, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from davae.models.lightningdit import LightningDiTTransformer2DModel


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random, also those that start at zero: otherwise equality would say little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.eval()


def lightningdit(**changes: Any) -> LightningDiTTransformer2DModel:
    config = {
        "sample_size": 4,
        "patch_size": 1,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_classes": 10,
    }
    return LightningDiTTransformer2DModel(**{**config, **changes})


def sd3(**changes: Any) -> SD3Transformer2DModel:
    config = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 12,
    }
    return SD3Transformer2DModel(**{**config, **changes})


def predict(model: nn.Module, latent: Tensor) -> Tensor:
    """The model's output for a latent, with conditioning that depends on its class alone."""
    generator = torch.Generator().manual_seed(5)
    batch = len(latent)
    if isinstance(model, LightningDiTTransformer2DModel):
        conditioning = {
            "timestep": torch.rand(batch, generator=generator),
            "class_labels": torch.randint(11, (batch,), generator=generator),
        }
    else:
        conditioning = {
            "timestep": 1000 * torch.rand(batch, generator=generator),
            "encoder_hidden_states": torch.randn(batch, 3, 24, generator=generator).to(latent.dtype),
            "pooled_projections": torch.randn(batch, 20, generator=generator).to(latent.dtype),
        }
    return model(latent, **conditioning).sample


#: patch 1 and 2, with and without QK-norm, dual attention.
VARIANTS = {
    "lightningdit-p1": lambda: lightningdit(),
    "lightningdit-p1-qknorm": lambda: lightningdit(qk_norm=True),
    "lightningdit-p2": lambda: lightningdit(patch_size=2),
    "lightningdit-p2-qknorm": lambda: lightningdit(patch_size=2, qk_norm=True),
    "sd3": lambda: sd3(),
    "sd3-patch-1": lambda: sd3(patch_size=1),
    "sd3-dual-qknorm": lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
}
