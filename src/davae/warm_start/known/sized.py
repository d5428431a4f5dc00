"""Classes that take an image latent and the sizes of the image beside the text."""

from __future__ import annotations

from typing import Any

import torch

from davae.warm_start.description import input_layer, output_layer
from davae.warm_start.dummy_inputs import Dummy
from davae.warm_start.registry import described


def _sizes(d: Dummy, *names: str) -> dict[str, Any]:
    height, width = d.latent.shape[-2:]
    sizes = torch.tensor([[8.0 * height, 8.0 * width]]).expand(d.batch, 2).to(d.latent.device)
    return {name: torch.zeros_like(sizes) if name == "crop_coords" else sizes for name in names}


@described(
    "CogView3PlusTransformer2DModel",
    "CogView4Transformer2DModel",
    inputs=input_layer("patch_embed.proj", "in_channels p p"),
    outputs=output_layer("proj_out", "c p p"),
    counts={"in_channels": ("c", "c | c"), "out_channels": "c"},
)
def _cogview(d: Dummy) -> dict[str, Any]:
    latents = d.config.in_channels // d.latent.shape[1]  # a control latent stands beside the noisy one
    return {
        "hidden_states": torch.cat(d.concatenated(latents), dim=1),
        "encoder_hidden_states": d.text(d.config.text_embed_dim),
        "timestep": d.time(1000),
        **_sizes(d, "original_size", "target_size", "crop_coords"),
    }


@described(
    "GlmImageTransformer2DModel",
    inputs=input_layer("image_projector.proj", "c p p"),
    outputs=output_layer("proj_out", "c p p"),
)
def _glm_image(d: Dummy) -> dict[str, Any]:
    rows, columns = d.grid(d.config.patch_size)
    # The forward indexes by a mask; where a mask has no values, by no positions.
    prior = d.integers(d.config.prior_vq_quantizer_codebook_size, rows * columns)
    return {
        "hidden_states": d.latent,
        "encoder_hidden_states": d.text(d.config.text_embed_dim),
        "prior_token_id": prior,
        "prior_token_drop": prior.new_zeros(0)
        if prior.is_meta
        else torch.zeros_like(prior, dtype=torch.bool),
        "timestep": d.time(1000),
        **_sizes(d, "target_size", "crop_coords"),
    }
