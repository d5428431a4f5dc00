"""Training a base pipeline from nothing: an autoencoder, then a class-conditional transformer on its latents."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models import LightningDiTTransformer2DModel
from davae.models.lightningdit_start import restarted
from davae.pipelines import ClassConditionalPipeline
from davae.training.base_autoencoder import BaseAutoencoderStage
from davae.training.diffusion import DiffusionStage
from davae.training.images import open_part
from davae.training.loop import TrainResult, train
from davae.training.memory import ImagesInMemory, MixedScales
from davae.training.processes import is_first, wait_for_everyone
from davae.training.provenance import data_facts
from davae.training.settings import BaseRecipe, DiffusionSettings

logger = logging.getLogger(__name__)


def train_base(recipe: BaseRecipe, out: Path, base: DiffusionPipeline | None = None) -> TrainResult:
    """Train a base pipeline into ``out/pipeline`` (runs ``out/autoencoder`` and ``out/transformer``).

    Both halves continue by themselves when the same call is made again.

    Args:
        recipe: what to train.
        out: the folder.
        base: the pipeline of ``recipe.start_from``; its autoencoder is kept, and only the second half is run.
    """
    plain = recipe.model_dump(mode="json")
    full = ImagesInMemory(open_part(recipe.data, "train"))
    reduce = partial(reduced, factor=recipe.downsample)
    images = ImagesInMemory(full, reduce)
    held_out = ImagesInMemory(open_part(recipe.data, "held_out"), reduce)
    if base is None:
        pipeline = _new_pipeline(recipe, out, full, images, held_out)
    else:
        pipeline = native_pipeline(recipe, base)
    settings = DiffusionSettings(**{k: getattr(recipe.transformer, k) for k in _SHARED_SECTIONS})
    layout = LatentLayout(pipeline.vae.config.latent_channels, 0)
    diffusion = DiffusionStage(pipeline, layout, settings, images, held_out, cache_latents=True)
    diffusion.facts = data_facts(recipe.data, full)
    result = train(diffusion, out / "transformer", plain)
    assert result is not None
    if is_first():  # the result holds the averaged weights, the pipeline in memory the last ones
        averaged = ClassConditionalPipeline.from_pretrained(result.result)
        averaged.to(getattr(torch, recipe.save_dtype)).save_pretrained(out / "pipeline")
    wait_for_everyone()
    return result


def native_pipeline(recipe: BaseRecipe, base: DiffusionPipeline) -> ClassConditionalPipeline:
    """The start of a native fine-tune: the base at the recipe's resolution, with the options of ``start_from``.

    Raises:
        DavaeError: the base is of another kind, or its compression and patches do not divide the resolution.
    """
    start = recipe.start_from
    assert start is not None
    if not isinstance(base, ClassConditionalPipeline):
        raise DavaeError(
            f"start_from.pipeline is a {type(base).__name__}; only a ClassConditionalPipeline can be "
            "fine-tuned at its own compression"
        )
    unit = base.vae_scale_factor * (start.patch_size or base.transformer.config.patch_size)
    side = recipe.data.resolution // recipe.downsample
    check_divides(side, unit)
    torch.manual_seed(recipe.transformer.loop.seed)
    transformer = restarted(
        base.transformer,
        sample_size=side // base.vae_scale_factor,
        patch_size=start.patch_size,
        qk_norm=start.qk_norm,
    )
    parts = {"vae": base.vae, "scheduler": base.scheduler, "id2label": base.config.id2label}
    return ClassConditionalPipeline(transformer=transformer, **parts)


def check_divides(side: int, unit: int) -> None:
    """The side of an image must be a multiple of a token's, both in pixels.

    Raises:
        DavaeError: it is not; names the nearest that is.
    """
    if side % unit:
        nearest = max(unit, round(side / unit) * unit)
        raise DavaeError(
            f"{side} pixels are not a multiple of {unit} (compression times patch); the nearest is {nearest}"
        )


def _new_pipeline(
    recipe: BaseRecipe, out: Path, full: ImagesInMemory, images: ImagesInMemory, held_out: ImagesInMemory
) -> ClassConditionalPipeline:
    """The first half, and a random transformer over it."""
    shape = recipe.transformer.architecture
    assert recipe.autoencoder is not None and shape is not None  # noqa: PT018 (the recipe's validation)
    compression = 2 ** (len(recipe.autoencoder.architecture.block_out_channels) - 1)
    side = recipe.data.resolution // recipe.downsample
    check_divides(side, compression * shape.patch_size)
    reduce = partial(reduced, factor=recipe.downsample)
    vae_folder = out / "autoencoder" / "vae"
    if not vae_folder.is_dir():
        mixed = MixedScales(full, reduce, recipe.full_resolution_crops, recipe.autoencoder.loop.seed)
        stage = BaseAutoencoderStage(recipe.autoencoder, mixed, images, held_out)
        stage.facts = data_facts(recipe.data, full)
        train(stage, out / "autoencoder", recipe.model_dump(mode="json"))
    vae = AutoencoderKL.from_pretrained(vae_folder)

    torch.manual_seed(recipe.transformer.loop.seed)
    transformer = LightningDiTTransformer2DModel(
        sample_size=side // compression,
        in_channels=vae.config.latent_channels,
        num_classes=len(images.classes),
        **shape.model_dump(),
    )
    return ClassConditionalPipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        id2label=dict(enumerate(images.classes)),
    )


_SHARED_SECTIONS = ("timesteps", "loss", "optimizer", "loop", "sample")


def reduced(images: Tensor, factor: int) -> Tensor:
    """``[B, 3, H, W]`` to ``[B, 3, H / factor, W / factor]`` as an upgrade's base sees it: bicubic, antialiased."""
    if factor == 1:
        return images
    size = (images.shape[-2] // factor, images.shape[-1] // factor)
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
