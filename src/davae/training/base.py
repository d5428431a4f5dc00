"""Training a base pipeline from nothing: an autoencoder, then a class-conditional transformer on its latents."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from davae.latents import LatentLayout
from davae.models import LightningDiTTransformer2DModel
from davae.pipelines import ClassConditionalPipeline
from davae.training.base_autoencoder import BaseAutoencoderStage
from davae.training.diffusion import DiffusionStage
from davae.training.images import open_part
from davae.training.loop import TrainResult, train
from davae.training.memory import ImagesInMemory, MixedScales
from davae.training.settings import BaseRecipe, DiffusionSettings

logger = logging.getLogger(__name__)


def train_base(recipe: BaseRecipe, out: Path) -> TrainResult:
    """Train a base pipeline into ``out/pipeline`` (runs ``out/autoencoder`` and ``out/transformer``).

    Both halves continue by themselves when the same call is made again.
    """
    plain = recipe.model_dump(mode="json")
    full = ImagesInMemory(open_part(recipe.data, "train"))
    reduce = partial(reduced, factor=recipe.downsample)
    images = ImagesInMemory(full, reduce)
    held_out = ImagesInMemory(open_part(recipe.data, "held_out"), reduce)

    vae_folder = out / "autoencoder" / "vae"
    if not vae_folder.is_dir():
        mixed = MixedScales(full, reduce, recipe.full_resolution_crops, recipe.autoencoder.loop.seed)
        stage = BaseAutoencoderStage(recipe.autoencoder, mixed, images, held_out)
        train(stage, out / "autoencoder", plain)
    vae = AutoencoderKL.from_pretrained(vae_folder)

    torch.manual_seed(recipe.transformer.loop.seed)
    shape = recipe.transformer.architecture
    compression = 2 ** (len(vae.config.block_out_channels) - 1)
    transformer = LightningDiTTransformer2DModel(
        sample_size=recipe.data.resolution // recipe.downsample // compression,
        in_channels=vae.config.latent_channels,
        num_classes=len(images.classes),
        **shape.model_dump(),
    )
    pipeline = ClassConditionalPipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        id2label=dict(enumerate(images.classes)),
    )
    settings = DiffusionSettings(**{k: getattr(recipe.transformer, k) for k in _SHARED_SECTIONS})
    layout = LatentLayout(vae.config.latent_channels, 0)
    diffusion = DiffusionStage(pipeline, layout, settings, images, held_out, cache_latents=True)
    result = train(diffusion, out / "transformer", plain)
    assert result is not None
    pipeline.to(getattr(torch, recipe.save_dtype)).save_pretrained(out / "pipeline")
    return result


_SHARED_SECTIONS = ("timesteps", "loss", "optimizer", "loop", "sample")


def reduced(images: Tensor, factor: int) -> Tensor:
    """``[B, 3, H, W]`` to ``[B, 3, H / factor, W / factor]`` as an upgrade's base sees it: bicubic, antialiased."""
    if factor == 1:
        return images
    size = (images.shape[-2] // factor, images.shape[-1] // factor)
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
