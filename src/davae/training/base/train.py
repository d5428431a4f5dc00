"""Training a base pipeline from nothing: an autoencoder, then a class-conditional transformer on its latents."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from davae.data import Mirrored
from davae.data.images.protocol import ItemDataset
from davae.data.in_memory import ImagesInMemory, MixedScales, Prepared
from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models import LightningDiTTransformer2DModel
from davae.models.lightningdit import restarted
from davae.pipelines import ClassConditionalPipeline
from davae.recipes.settings import BaseRecipe, DiffusionSettings
from davae.runtime.atomic_files import atomic_folder
from davae.runtime.pictures import reduced
from davae.runtime.processes import is_first, wait_for_everyone
from davae.training.base.autoencoder_stage import BaseAutoencoderStage
from davae.training.cache.write import open_cache
from davae.training.checkpoints.run_directory import data_facts
from davae.training.data import open_part
from davae.training.diffusion import DiffusionStage
from davae.training.loop.loop import TrainResult, train

logger = logging.getLogger(__name__)


def train_base(recipe: BaseRecipe, out: Path, base: DiffusionPipeline | None = None) -> TrainResult:
    """Train a base pipeline into ``out/pipeline`` (runs ``out/autoencoder`` and ``out/transformer``).

    Both halves continue by themselves when the same call is made again. With ``data.cache_latents`` the latents stay in
    memory, and for the first half the images too; with ``data.cache`` latents are read from there. Otherwise images are
    read, and encoded, as training asks for them.

    Args:
        recipe: what to train.
        out: the folder.
        base: the pipeline of ``recipe.start_from``; its autoencoder is kept, and only the second half is run.
    """
    plain = recipe.model_dump(mode="json")
    data = recipe.data
    full: ItemDataset
    images: ItemDataset
    if data.cache and base is not None:
        full = images = open_cache(data, base.vae, base)
    else:
        full, images = _training_images(recipe, keep=data.cache_latents and base is None)
    held_out = ImagesInMemory(open_part(data, "held_out"), partial(reduced, factor=recipe.downsample))
    if base is None:
        pipeline = _new_pipeline(recipe, out, full, images, held_out)
    else:
        pipeline = native_pipeline(recipe, base)
    settings = DiffusionSettings(**{k: getattr(recipe.transformer, k) for k in _SHARED_SECTIONS})
    layout = LatentLayout(pipeline.vae.config.latent_channels, 0)
    diffusion = DiffusionStage(
        pipeline,
        layout,
        settings,
        images,
        held_out,
        cache_latents=data.cache_latents and not data.cache,
        workers=data.workers,
        timeout_s=data.timeout_s,
    )
    diffusion.facts = data_facts(data, held_out)
    result = train(diffusion, out / "transformer", plain)
    assert result is not None
    if is_first():  # the result holds the averaged weights, the pipeline in memory the last ones
        averaged = ClassConditionalPipeline.from_pretrained(result.result)
        averaged.to(getattr(torch, recipe.save_dtype))
        with atomic_folder(out / "pipeline") as folder:
            averaged.save_pretrained(folder)
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


def _training_images(recipe: BaseRecipe, *, keep: bool) -> tuple[ItemDataset, ItemDataset]:
    """The training images at full resolution, and as the base sees them; made once and kept, or when asked for."""
    found = open_part(recipe.data, "train")
    if not keep:
        if recipe.downsample == 1:
            return found, found
        return found, Prepared(found, partial(_reduced_item, factor=recipe.downsample))
    full = ImagesInMemory(found.unmirrored())
    small = full
    if recipe.downsample > 1:
        small = ImagesInMemory(full, partial(reduced, factor=recipe.downsample))
    return (Mirrored(full, found.seed), Mirrored(small, found.seed)) if found.flip else (full, small)


def _new_pipeline(
    recipe: BaseRecipe, out: Path, full: ItemDataset, images: ItemDataset, held_out: ImagesInMemory
) -> ClassConditionalPipeline:
    """The first half, and a random transformer over it."""
    shape = recipe.transformer.architecture
    assert recipe.autoencoder is not None and shape is not None  # noqa: PT018 (the recipe's validation)
    compression = 2 ** (len(recipe.autoencoder.architecture.block_out_channels) - 1)
    side = recipe.data.resolution // recipe.downsample
    check_divides(side, compression * shape.patch_size)
    reduce = partial(reduced, factor=recipe.downsample)
    vae_folder = out / "autoencoder" / "vae"
    if not _is_saved(vae_folder):
        workers, timeout_s = recipe.data.workers, recipe.data.timeout_s
        kept = full.unmirrored()
        if workers and isinstance(kept, ImagesInMemory):
            kept.read_all(workers, timeout_s)
        mixed = MixedScales(full, reduce, recipe.full_resolution_crops, recipe.autoencoder.loop.seed)
        stage = BaseAutoencoderStage(
            recipe.autoencoder, mixed, images, held_out, workers=workers, timeout_s=timeout_s
        )
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


def _is_saved(model: Path) -> bool:
    """Whether a model's folder holds its weights to the last byte; an earlier version could leave part of it."""
    weights = model / SAFETENSORS_WEIGHTS_NAME
    if not ((model / "config.json").is_file() and weights.is_file()):
        return False
    try:
        with safe_open(weights, "pt"):  # compares the file's length with its header
            return True
    except SafetensorError:
        return False


_SHARED_SECTIONS = ("timesteps", "loss", "optimizer", "loop", "sample")


def _reduced_item(item: dict[str, Any], factor: int) -> dict[str, Any]:
    return {**item, "image": reduced(item["image"][None], factor)[0]}
