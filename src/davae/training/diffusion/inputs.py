"""What the diffusion stage trains on and is measured with, encoded before a transformer needs to be in memory."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.data import Dataset

from davae.data import Item, ItemDataset, as_item_dataset
from davae.data.in_memory import LatentsInMemory, Prepared
from davae.pipelines.families import ClassFamily, PipelineFamily, family_of
from davae.recipes.settings import DiffusionSettings
from davae.runtime.pixel_budget import in_parts
from davae.runtime.processes import start_processes
from davae.training.data import require_captions
from davae.training.diffusion.conditioning import ClassMap, PromptEmbeddings
from davae.training.diffusion.validation import MEASURED

logger = logging.getLogger(__name__)


@dataclass
class Inputs:
    """Items for training and measuring, with their conditioning.

    Attributes:
        family: of the pipeline.
        conditions: labels of the pipeline, or embeddings of all captions and validation prompts.
        dataset: for training: items with ``latent``, or with ``image`` if ``encodes_while_training``.
        measured: the first held-out items, with ``latent``.
        images: the held-out images.
        validation_prompts: of samples; empty for a class-conditional family.
        encodes_while_training: images are encoded in each step.
        workers: loader processes.
        timeout_s: seconds to wait for a batch of images; 0 waits forever.
    """

    family: PipelineFamily
    conditions: ClassMap | PromptEmbeddings
    dataset: ItemDataset
    measured: ItemDataset
    images: ItemDataset
    validation_prompts: list[str]
    encodes_while_training: bool
    workers: int = 0
    timeout_s: float = 0.0


def prepare_inputs(
    pipeline: DiffusionPipeline,
    vae: Any,
    settings: DiffusionSettings,
    dataset: Dataset[Item],
    held_out: Dataset[Item],
    *,
    cache_latents: bool = True,
    workers: int = 0,
    timeout_s: float = 0.0,
) -> Inputs:
    """Encode what is encoded once: held-out images, training images if wanted, captions and validation prompts.

    Args:
        pipeline: of a known family, with its text encoders; the weights of its transformer and autoencoder are not
            used.
        vae: the autoencoder that encodes; on the CPU afterwards.
        settings: the recipe's section.
        dataset: images with labels or captions; a cache has ``latent`` and, for text, ``conditioning`` instead.
        held_out: validation images with labels or captions.
        cache_latents: encode the images once and keep the latents in memory.
        workers: loader processes.
        timeout_s: seconds to wait for a batch of images; 0 waits forever.

    Raises:
        DavaeError: the pipeline is unknown, captions are needed and missing, or settings do not fit.
    """
    family = family_of(pipeline)
    family.check_length(settings.prompts.max_length)
    if family.follow_transformer and not settings.prompts.dropout:
        logger.warning(
            "diffusion.prompts.dropout is 0, so that the transformer does not learn to predict without a prompt, and "
            "%s guides with that: set it to 0.1, or sample with a guidance of 1",
            family.name,
        )
    if isinstance(family, ClassFamily):
        family.check_interval(settings.sample.guidance_interval)
    device = start_processes().device
    images, unseen = as_item_dataset(dataset), as_item_dataset(held_out)
    vae.eval().requires_grad_(False).to(device)
    encode = partial(encode_images, family, vae, details_seed=details_seed_of(settings))
    measured = LatentsInMemory(unseen, encode, dict, limit=MEASURED, workers=workers, timeout_s=timeout_s)
    prompts = validation_prompts(settings, unseen) if family.conditioned_on == "text" else []
    asked = [*prompts[: settings.loop.validation_images], *(item["caption"] for item in measured.items)]
    conditions = _conditions(pipeline, family, images, asked, settings, device)
    if images.holds_latents and family.conditioned_on == "text":
        items = images
    elif cache_latents and not images.holds_latents:
        items = LatentsInMemory(
            images, encode, conditions.prepare, workers=workers, timeout_s=timeout_s, shown="diffusion: images encoded"
        )
    else:  # a cache keeps labels as the data set has them
        items = Prepared(images, conditions.prepare)
    vae.to("cpu")
    return Inputs(
        family,
        conditions,
        items,
        Prepared(measured, conditions.prepare),
        unseen,
        prompts,
        encodes_while_training=not (images.holds_latents or cache_latents),
        workers=workers,
        timeout_s=timeout_s,
    )


def validation_prompts(settings: DiffusionSettings, images: ItemDataset) -> list[str]:
    """The recipe's distinct prompts, else the held-out images' captions, in order; the empty prompt if none."""
    found = settings.prompts.validation or images.captions()
    return list(dict.fromkeys(caption for caption in found if caption)) or [""]


def details_seed_of(settings: DiffusionSettings) -> int | None:
    """Seed of the details' draws; none if their mean is taken."""
    return settings.loop.seed if settings.sample_details else None


@torch.no_grad()
def encode_images(family: PipelineFamily, vae: Any, images: Tensor, *, details_seed: int | None = None) -> Tensor:
    """Images ``[B, 3, H, W]`` to the transformer's (scaled) latents ``[B, C + D, h, w]``, without autocast."""
    with torch.autocast(vae.device.type, enabled=False):
        return torch.cat([family.latents_of(vae, part, details_seed=details_seed) for part in in_parts(images)])


def _conditions(
    pipeline: DiffusionPipeline,
    family: PipelineFamily,
    images: ItemDataset,
    asked: Sequence[str],
    settings: DiffusionSettings,
    device: torch.device,
) -> ClassMap | PromptEmbeddings:
    """What turns an item's label or caption into the transformer's conditioning; a cache has its captions' own."""
    if family.conditioned_on == "class":
        return ClassMap(images.classes, pipeline)
    trained = images.captions()
    require_captions(trained, pipeline)
    asked = asked if images.holds_latents else [*trained, *asked]
    return PromptEmbeddings(family, pipeline, asked, device, settings.prompts.max_length)
