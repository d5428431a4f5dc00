"""Small pipelines upgraded, and what to compare: noise in both widths, images of the base channels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from davae.bases.debug_pipelines import base_resolution, small_pipeline
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.families.family import pack, unpack

DETAILS = 8
PACKED = ("flux", "qwenimage")


@functools.cache
def autoencoder(name: str, scale: int = 2) -> AutoencoderDA:
    """For the small pipeline of that name; shared, so not to be changed, and the same whoever asks first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderDA.from_base(small_pipeline(name).vae, scale=scale, detail_channels=DETAILS)


def base_and_upgraded(name: str, scale: int = 2, **options: Any) -> tuple[DiffusionPipeline, Any]:
    base = small_pipeline(name)
    return base, upgrade_pipeline(base, autoencoder(name, scale), **options)


def noises(name: str, pipe: DiffusionPipeline, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Base noise and the same with noise for the details, as the pipelines take them."""
    channels = pipe.vae.layout.base_channels
    side = base_resolution(name) // pipe.vae.base_compression
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(batch, channels + DETAILS, side, side, generator=generator)
    both = wide[:, :channels], wide
    return (pack(both[0]), pack(both[1])) if name in PACKED else both


@torch.no_grad()
def base_image(name: str, pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """``decode_base`` of a pipeline's final latents, [B, 3, h, w] in [0, 1]."""
    vae = pipe.vae
    if name in PACKED:
        side = 2 * int(latents.shape[1] ** 0.5)
        latents = unpack(latents, side, side)
    config = vae.config
    if config.get("latents_mean") is not None:
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        raw = latents * std + mean
    else:
        raw = latents / config.scaling_factor + (config.shift_factor or 0.0)
    return (vae.decode_base(raw) / 2 + 0.5).clamp(0, 1)
