"""What a pipeline's constructor cannot learn from an upgraded autoencoder: that its sizes are full-resolution ones.

Most pipelines derive everything from the autoencoder's configuration. Some write a number down (Lumina 2 takes 8
pixels a latent position for granted), and some move a requested size to the nearest of a list (PixArt, SANA), which
holds base resolutions. This is mended here on the pipeline in memory, with what else a class takes for granted about
its latents. Nothing of it is part of a saved pipeline, so that it is done again after loading.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PixArtImageProcessor, VaeImageProcessor
from torch import nn

from davae.latents import LatentLayout
from davae.models import AutoencoderDA

logger = logging.getLogger(__name__)
P = TypeVar("P", bound=DiffusionPipeline)

_TINY = {torch.float16: 2.0**-11}  # the square of each is still a number of its precision
_TINY_ELSEWHERE = 2.0**-60


class FullResolutionProcessor(PixArtImageProcessor):
    """An image processor whose list of sizes is in base resolution, while requests are in full resolution.

    Args:
        scale: ``s``.
        vae_scale_factor: pixels per latent position, full resolution.
    """

    def __init__(self, scale: int, vae_scale_factor: int) -> None:
        super().__init__(vae_scale_factor=vae_scale_factor)
        self.scale = scale

    def classify_height_width_bin(  # static in the base class, but pipelines call it on the instance
        self, height: int, width: int, ratios: dict[str, tuple[int, int]]
    ) -> tuple[int, int]:
        """``s`` times the entry of the list that has the nearest aspect ratio."""
        base_height, base_width = PixArtImageProcessor.classify_height_width_bin(height, width, ratios)
        return self.scale * base_height, self.scale * base_width


def fit_to_autoencoder(pipe: P) -> P:
    """Make ``height`` and ``width`` of a pipeline with an :class:`AutoencoderDA` mean full resolution; idempotent.

    Called by :func:`upgrade_pipeline` and :func:`davae.load_pipeline`. Pipelines without such an autoencoder, and
    those that find everything out themselves, stay as they are.

    Args:
        pipe: changed in place.

    Returns:
        The same pipeline.
    """
    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, AutoencoderDA):
        return pipe
    known = vars(pipe).get("vae_scale_factor")
    # Some count more than the autoencoder's own compression (a patch on top of it), but none can count less.
    if known is not None and known < vae.spatial_compression:
        pipe.vae_scale_factor = known * vae.scale
        if "default_image_size" in vars(pipe):
            pipe.default_image_size *= vae.scale
        for name, processor in _image_processors(pipe):
            grown = processor.config.vae_scale_factor * vae.scale
            setattr(pipe, name, type(processor).from_config(processor.config, vae_scale_factor=grown))
        logger.info(
            "%s: %d pixels a latent position instead of %d", type(pipe).__name__, pipe.vae_scale_factor, known
        )
    for name, processor in _image_processors(pipe):
        if type(processor) is PixArtImageProcessor:
            setattr(pipe, name, FullResolutionProcessor(vae.scale, processor.config.vae_scale_factor))
    guard_silent_details(pipe, vae.layout)
    cls = type(pipe)
    if cls.__name__ == "StableDiffusion3InpaintPipeline" and cls.__module__.startswith("diffusers."):
        from davae.pipelines.families.sd3_inpaint import (
            StableDiffusion3InpaintPipeline,  # imports all of SD3: only here
        )

        pipe.__class__ = StableDiffusion3InpaintPipeline
    return pipe


def _image_processors(pipe: DiffusionPipeline) -> list[tuple[str, VaeImageProcessor]]:
    return [(name, part) for name, part in vars(pipe).items() if isinstance(part, VaeImageProcessor)]


def guard_silent_details(pipe: DiffusionPipeline, layout: LatentLayout) -> None:
    """Add the guard to the transformer of a pipeline that needs it, once. Its weights stay as they are.

    Args:
        pipe: an upgraded pipeline.
        layout: of its latent.
    """
    is_lumina = any(cls.__name__ == "Lumina2Pipeline" for cls in type(pipe).__mro__)
    if not is_lumina or hasattr(pipe.transformer, "guards_silent_details"):
        return

    def off_zero(module: nn.Module, arguments: Any, output: Any) -> Any:
        if (
            torch.is_grad_enabled() or not module.guards_silent_details
        ):  # in training the prediction is itself
            return output
        details = output[0][:, layout.detail]
        details.masked_fill_(details == 0, _TINY.get(details.dtype, _TINY_ELSEWHERE))
        return output

    pipe.transformer.register_forward_hook(off_zero)
    pipe.transformer.guards_silent_details = True


@contextmanager
def unguarded(transformer: Any) -> Iterator[None]:
    """Within the context a guarded transformer predicts what its weights say, zeros included."""
    guarded = hasattr(transformer, "guards_silent_details")
    if guarded:
        transformer.guards_silent_details = False
    try:
        yield
    finally:
        if guarded:
            transformer.guards_silent_details = True
