"""Small parts to build pipelines from."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin

from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.class_conditional import ClassConditionalPipeline
from davae.warm_start import channel_parameters

NAMES = {0: "brick wall", 1: "meadow", 2: "Lake"}


def small_vae(channels: int = 4) -> AutoencoderKL:
    """An f2 autoencoder with random weights."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
        layers_per_block=1,
    ).eval()


def pipeline_around(transformer: ModelMixin, **parts: Any) -> ClassConditionalPipeline:
    """A pipeline with this transformer and small parts besides."""
    defaults = {
        "vae": small_vae(transformer.config.in_channels),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "id2label": NAMES,
    }
    pipeline = ClassConditionalPipeline(transformer=transformer, **{**defaults, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def upgraded(base: DiffusionPipeline, *, detail_channels: int = 4, seed: int = 0) -> DiffusionPipeline:
    """The upgrade by 2, as if it had been tuned: the detail channels take part."""
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=detail_channels)
    pipe = upgrade_pipeline(base, vae)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(pipe.transformer.named_parameters())
    for name in channel_parameters(pipe.transformer):
        values = parameters[name].data
        values += 0.02 * torch.randn(values.shape, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe
