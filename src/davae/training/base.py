"""Training a base pipeline from nothing: an autoencoder, then a class-conditional transformer on its latents."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from davae.data import open_dataset
from davae.latents import LatentLayout
from davae.models import LightningDiTTransformer2DModel
from davae.pipelines import ClassConditionalPipeline
from davae.training.autoencoder import BaseAutoencoderStage
from davae.training.diffusion import DiffusionStage
from davae.training.loop import TrainResult, train
from davae.training.memory import ImagesInMemory, MixedScales
from davae.training.settings import BaseRecipe, DataSettings, DiffusionSettings

logger = logging.getLogger(__name__)


def train_base(recipe: BaseRecipe, out: Path) -> TrainResult:
    """Train a base pipeline into ``out/pipeline`` (runs ``out/autoencoder`` and ``out/transformer``).

    Both halves continue by themselves when the same call is made again.
    """
    plain = recipe.model_dump(mode="json")
    full = open_images(recipe.data)
    reduce = partial(reduced, factor=recipe.downsample)
    images = ImagesInMemory(full, reduce)
    held_out = open_images(recipe.data, part="held_out", downsample=recipe.downsample)

    vae_folder = out / "autoencoder" / "vae"
    if not vae_folder.is_dir():
        mixed = MixedScales(full, reduce, recipe.full_resolution_crops, recipe.autoencoder.loop.seed)
        stage = BaseAutoencoderStage(recipe.autoencoder, mixed, images, held_out)
        train(stage, out / "autoencoder", plain)
    vae = AutoencoderKL.from_pretrained(vae_folder)

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
    shutil.copytree(result.result, out / "pipeline", dirs_exist_ok=True)
    return result


_SHARED_SECTIONS = ("timesteps", "loss", "optimizer", "loop", "sample")


def open_images(
    data: DataSettings, part: Literal["train", "held_out"] = "train", downsample: int = 1
) -> ImagesInMemory:
    """The images of a recipe's data section, kept in memory, reduced by ``downsample``."""
    dataset = open_dataset(
        data.path,
        resolution=data.resolution,
        crop=data.crop,
        flip=data.flip and part == "train",
        split=data.split,
        hold_out=data.hold_out,
        part=part,
    )
    return ImagesInMemory(dataset, partial(reduced, factor=downsample))


def reduced(images: Tensor, factor: int) -> Tensor:
    """``[B, 3, H, W]`` to ``[B, 3, H / factor, W / factor]`` as an upgrade's base sees it: bicubic, antialiased."""
    if factor == 1:
        return images
    size = (images.shape[-2] // factor, images.shape[-1] // factor)
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
