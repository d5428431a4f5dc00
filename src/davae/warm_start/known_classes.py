"""The described transformer classes, and small inputs to run them with."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.warm_start.channel_places import ChannelDescription, describe, input_layer, output_layer

TEXT_TOKENS = 8  # of a dummy prompt


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that every device sees the same values.
    return torch.randn(shape, generator=generator).to(like)


def _sd3_inputs(transformer: ModelMixin, latent: Tensor, generator: torch.Generator) -> dict[str, Any]:
    batch, config = latent.shape[0], transformer.config
    return {
        "hidden_states": latent,
        "encoder_hidden_states": _normal((batch, TEXT_TOKENS, config.joint_attention_dim), latent, generator),
        "pooled_projections": _normal((batch, config.pooled_projection_dim), latent, generator),
        "timestep": 1000 * torch.rand(batch, generator=generator).to(latent.device),
    }


def _lightningdit_inputs(
    transformer: ModelMixin, latent: Tensor, generator: torch.Generator
) -> dict[str, Any]:
    batch = latent.shape[0]
    labels = torch.randint(transformer.config.num_classes + 1, (batch,), generator=generator)
    return {
        "hidden_states": latent,
        "timestep": torch.rand(batch, generator=generator).to(latent.device),
        "class_labels": labels.to(latent.device),
    }


describe(
    "SD3Transformer2DModel",
    ChannelDescription(
        inputs=input_layer("pos_embed.proj"),  # convolution of kernel and stride p
        outputs=output_layer("proj_out", "p p c"),
        dummy_inputs=_sd3_inputs,
    ),
)
describe(
    "LightningDiTTransformer2DModel",
    ChannelDescription(
        inputs=input_layer("patch_embed"),
        outputs=output_layer("proj_out", "p p c"),
        dummy_inputs=_lightningdit_inputs,
    ),
)
