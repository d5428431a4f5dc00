"""Mends for pipelines whose classes take something for granted about sizes or latents.

Most pipelines derive everything from the autoencoder's configuration. Some write a number down (Lumina 2 takes 8
pixels a latent position for granted), some move a requested size to the nearest of a list of base resolutions (PixArt,
SANA), one divides by what is 0 while details are silent. This is mended on the pipeline in memory, and again after
loading: nothing of it is part of a saved pipeline. Which family needs which mend is said in the family.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PixArtImageProcessor, VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from davae.latents import LatentLayout
from davae.models import AutoencoderDA

logger = logging.getLogger(__name__)

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


def fit_sizes(pipe: DiffusionPipeline, vae: AutoencoderDA) -> None:
    """Make ``height`` and ``width`` of an upgraded pipeline mean full resolution, in place; idempotent.

    Pipelines that derive them from the autoencoder stay as they are.
    """
    known = vars(pipe).get("vae_scale_factor")
    # Some count more than the autoencoder's own compression (a patch on top of it), but none can count less.
    if known is not None and known < vae.spatial_compression:
        pipe.vae_scale_factor = known * vae.scale
        if "default_image_size" in vars(pipe):
            pipe.default_image_size *= vae.scale
        for name, processor in _image_processors(pipe):
            grown = processor.config.vae_scale_factor * vae.scale
            setattr(pipe, name, type(processor).from_config(processor.config, vae_scale_factor=grown))
        logger.info("%s: %d pixels a latent position instead of %d", type(pipe).__name__, pipe.vae_scale_factor, known)
    for name, processor in _image_processors(pipe):
        if type(processor) is PixArtImageProcessor:
            setattr(pipe, name, FullResolutionProcessor(vae.scale, processor.config.vae_scale_factor))


def _image_processors(pipe: DiffusionPipeline) -> list[tuple[str, VaeImageProcessor]]:
    return [(name, part) for name, part in vars(pipe).items() if isinstance(part, VaeImageProcessor)]


def add_zero_detail_guard(transformer: ModelMixin, layout: LatentLayout) -> None:
    """Move details that are exactly 0 off zero where nothing learns; once, the weights stay as they are.

    For pipelines that divide by the norm of a channel's prediction. Lumina 2 rescales its guided prediction, row by
    row, by ``|conditional| / |guided|``: detail channels that were never tuned give 0 / 0, and after one more step
    every channel is lost. They are moved by far less than could show; the ratio is then 1.

    Args:
        transformer: of an upgraded pipeline.
        layout: of its latent.
    """
    if hasattr(transformer, "zero_detail_guard"):
        return

    def off_zero(module: nn.Module, arguments: Any, output: Any) -> Any:
        # In training the prediction is itself.
        if torch.is_grad_enabled() or not module.zero_detail_guard:
            return output
        details = output[0][:, layout.detail]
        details.masked_fill_(details == 0, _TINY.get(details.dtype, _TINY_ELSEWHERE))
        return output

    transformer.register_forward_hook(off_zero)
    transformer.zero_detail_guard = True


@contextmanager
def unguarded(transformer: Any) -> Iterator[None]:
    """Within the context a guarded transformer predicts what its weights say, zeros included."""
    guarded = hasattr(transformer, "zero_detail_guard")
    if guarded:
        transformer.zero_detail_guard = False
    try:
        yield
    finally:
        if guarded:
            transformer.zero_detail_guard = True
