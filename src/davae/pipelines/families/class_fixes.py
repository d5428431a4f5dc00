"""Corrections for pipelines whose classes make assumptions about sizes or latents.

Most pipelines derive everything from the autoencoder's configuration. Some contain a constant (Lumina 2 assumes 8
pixels per latent position), some round a requested size to the nearest of a list of base resolutions (PixArt, SANA),
one divides by a norm that is 0 while the predicted details are zero. The corrections are made on the pipeline in
memory, again after each loading, and are never saved. Each family states which it needs.
"""

import functools
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PixArtImageProcessor, VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models import AutoencoderDA
from davae.warm_start import description_of
from davae.warm_start.patterns import pattern_count

logger = logging.getLogger(__name__)

_TINY = {torch.float16: 2.0**-11}  # the square does not underflow to zero in this dtype
_TINY_ELSEWHERE = 2.0**-60


class FullResolutionProcessor(PixArtImageProcessor):
    """An image processor for a list of sizes in base resolution and requests in full resolution.

    Args:
        scale: ``s``.
        vae_scale_factor: pixels of the full resolution per latent position and side.
    """

    def __init__(self, scale: int, vae_scale_factor: int) -> None:
        super().__init__(vae_scale_factor=vae_scale_factor)
        self.scale = scale

    def classify_height_width_bin(  # static in the base class, but pipelines call it on the instance
        self, height: int, width: int, ratios: dict[str, tuple[int, int]]
    ) -> tuple[int, int]:
        """``s`` times the size in the list whose aspect ratio is nearest."""
        base_height, base_width = PixArtImageProcessor.classify_height_width_bin(height, width, ratios)
        return self.scale * base_height, self.scale * base_width


def fit_sizes(pipe: DiffusionPipeline, vae: AutoencoderDA) -> None:
    """Make ``height`` and ``width`` of an upgraded pipeline mean full resolution, in place; idempotent.

    Pipelines that derive sizes from the autoencoder are not changed.
    """
    known = vars(pipe).get("vae_scale_factor")
    # Some have more than the autoencoder's compression (times a patch size); less means that it was not read.
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


def check_sizes(pipe: DiffusionPipeline, vae: AutoencoderDA) -> None:
    """Make an upgraded pipeline check ``height`` and ``width`` with its own pixels per token; idempotent.

    Some classes refuse sizes that are not multiples of a constant (SANA 32, PixArt 8, CogView 16). An upgraded pipeline
    has larger steps: sizes between them would pass and give smaller images, so they are refused too. Classes that round
    sizes instead go on doing so.
    """
    if hasattr(type(pipe), "check_inputs"):
        pipe.check_inputs = functools.partial(_check_inputs, pipe, vae.spatial_compression)


def _check_inputs(pipe: Any, compression: int, *args: Any, **kwargs: Any) -> Any:
    own = functools.partial(type(pipe).check_inputs, pipe)
    checked = own(*args, **kwargs)
    try:
        given = inspect.signature(own).bind(*args, **kwargs)
    except TypeError:
        return checked
    sizes = {name: given.arguments.get(name) for name in ("height", "width")}
    patch = getattr(getattr(pipe.transformer, "config", None), "patch_size", 1)
    unit = compression * (patch if isinstance(patch, int) else 1)
    odd = {name: int(size) for name, size in sizes.items() if isinstance(size, int | float) and size % unit}
    for name, size in odd.items():
        if _refuses(own, given, name, size + 1):  # never a multiple: only classes that refuse sizes refuse it
            below, above = max(size // unit, 1) * unit, (size // unit + 1) * unit
            raise DavaeError(
                f"{name} {size} does not fit this {type(pipe).__name__}: after the upgrade it makes images in steps of "
                f"{unit} pixels. Ask for {below} or {above}"
            )
    return checked


def _refuses(check: Any, given: inspect.BoundArguments, name: str, size: int) -> bool:
    other = inspect.BoundArguments(given.signature, dict(given.arguments) | {name: size})
    try:
        check(*other.args, **other.kwargs)
    except ValueError:
        return True
    return False


def fit_base_loras(transformer: Any, layout: LatentLayout) -> None:
    """Let a widened transformer load LoRAs that were trained on its base; idempotent.

    A LoRA on the token embedder or the head has the base's channels only. It is padded with zeros for the detail
    channels, as the widened weights are, so that it has the same effect.
    """
    if hasattr(type(transformer), "load_lora_adapter"):
        transformer.load_lora_adapter = functools.partial(_load_lora_adapter, transformer, layout)


def _load_lora_adapter(
    transformer: Any, layout: LatentLayout, lora: Any, prefix: str | None = "transformer", **options: Any
) -> Any:
    if isinstance(lora, Mapping):
        lora = padded_lora(transformer, layout, lora, prefix=prefix)
    return type(transformer).load_lora_adapter(transformer, lora, prefix=prefix, **options)


# Names of the two matrices in peft, earlier versions of diffusers, and kohya.
_LORA_IN = ("lora_A.weight", "lora.down.weight", "lora_down.weight")
_LORA_OUT = ("lora_B.weight", "lora.up.weight", "lora_up.weight")


def padded_lora(
    transformer: Any, layout: LatentLayout, lora: Mapping[str, Tensor], *, prefix: str | None = None
) -> dict[str, Tensor]:
    """A LoRA's weights, with zeros for the detail channels inserted wherever an axis has the base's channels.

    Args:
        transformer: widened.
        layout: its base and detail channels.
        lora: by name, ``LAYER.lora_A.weight`` ``[r, in, ...]`` and ``LAYER.lora_B.weight`` ``[out, r, ...]``.
        prefix: of every name, without the dot that follows it.
    """
    description = description_of(transformer).fitted(transformer, layout.channels)
    sizes, padded, start = description.resolve_sizes(transformer), dict(lora), f"{prefix}." if prefix else ""
    for place in description.places:
        if not place.parameter.endswith(".weight"):
            continue
        base = pattern_count(place.pattern, sizes, layout.base_channels)
        for end in _LORA_IN if place.axis == 1 else _LORA_OUT:
            weight = lora.get(f"{start}{place.layer}.{end}")
            if weight is not None and weight.shape[place.axis] == base:
                padded[f"{start}{place.layer}.{end}"] = place.widen(weight, sizes, layout)
    return padded


@dataclass
class _OffZero:
    """A forward hook; a class of its own, so that a guarded transformer can be copied and pickled."""

    layout: LatentLayout
    mends_a_class = True  # not the user's hook: an upgrade adds it again by itself

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        # In training the prediction is not changed.
        if torch.is_grad_enabled() or not module.zero_detail_guard:
            return output
        details = output[0][:, self.layout.detail]
        details.masked_fill_(details == 0, _TINY.get(details.dtype, _TINY_ELSEWHERE))
        return output


def add_zero_detail_guard(transformer: ModelMixin, layout: LatentLayout) -> None:
    """Replace predicted details that are exactly 0 by a tiny number while gradients are disabled; idempotent.

    For pipelines that divide by the norm of a channel's prediction. Lumina 2 rescales its guided prediction, row by
    row, by ``|conditional| / |guided|``: detail channels that were never tuned give 0 / 0 = NaN, which spreads to every
    channel in the next step. The tiny number is invisible in images, and the ratio is then 1.

    Args:
        transformer: of an upgraded pipeline.
        layout: of its latent.
    """
    if not hasattr(transformer, "zero_detail_guard"):
        transformer.register_forward_hook(_OffZero(layout))
        transformer.zero_detail_guard = True


@contextmanager
def unguarded(transformer: Any) -> Iterator[None]:
    """Within the context a guarded transformer returns its exact prediction, zeros included."""
    guarded = hasattr(transformer, "zero_detail_guard")
    if guarded:
        transformer.zero_detail_guard = False
    try:
        yield
    finally:
        if guarded:
            transformer.zero_detail_guard = True
