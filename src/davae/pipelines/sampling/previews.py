"""Previews while an upgraded pipeline samples: its first latent channels are the base's, which a small decoder of the
base model (such as TAESD) decodes at base resolution at little cost.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.errors import DavaeError
from davae.models import find_adapter
from davae.models.latent_space import decode, from_model_space
from davae.pipelines.families import find_family
from davae.pipelines.families.family import unpack
from davae.warm_start.plain_state import unwrapped

logger = logging.getLogger(__name__)
OutputType = Literal["pil", "np", "pt"]


def set_preview_decoder(pipe: DiffusionPipeline, decoder: ModelMixin) -> None:
    """Give an upgraded pipeline a decoder for previews. It is not a component, so it is not saved with the pipeline.

    Args:
        pipe: with an :class:`davae.AutoencoderDA`.
        decoder: an autoencoder of the base model's latent space, such as ``AutoencoderTiny``. It stays on
            its device when the pipeline is moved; latents are moved to it.

    Raises:
        DavaeError: the class is unknown, or it decodes another number of channels than the base latent has.
    """
    decoder = unwrapped(decoder)
    _, adapter = find_adapter(type(decoder).__name__)
    found, expected = adapter.latent_channels(decoder), pipe.vae.layout.base_channels
    if found != expected:
        raise DavaeError(
            f"the preview decoder takes {found} latent channels, the base latent has {expected}: use the tiny "
            "autoencoder of the same base model"
        )
    pipe.preview_decoder = decoder


class Previews:
    """Collects images at base resolution while a pipeline samples.

    ::

        previews = Previews(pipe, every=4)
        pipe("a red fox in snow", callback_on_step_end=previews)
        previews.images        # {3: [image, ...], 7: [image, ...], ...}

    Pipelines with the older ``callback`` (PixArt) take ``callback=previews.on_step``.

    A preview shows the clean image that a step predicts if it can be computed: with the flow-matching Euler scheduler
    from two successive latents (so from the second step on), with DPM-Solver++ from the solver's stored prediction.
    Otherwise it shows the noisy latent.

    Args:
        pipe: an upgraded pipeline. Without a preview decoder (``upgrade_pipeline(..., preview_decoder=)`` or
            :func:`set_preview_decoder`) the base VAE's decoder is used, at the cost of decoding at base resolution.
        every: number of steps from one preview to the next, at least 1.
        output_type: "pil", "np" (float [B, H, W, 3] in [0, 1]) or "pt" (float [B, 3, H, W] in [0, 1]).
        height, width: size given to the pipeline, in pixels; needed for images that are not square if the pipeline
            packs its latents (FLUX, Qwen-Image).
        on_preview: called with the step's number, counted from 0, and the preview's images.

    Raises:
        DavaeError: `every` is below 1, or only one of `height` and `width` is given.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        every: int = 1,
        output_type: OutputType = "pil",
        height: int | None = None,
        width: int | None = None,
        on_preview: Callable[[int, Any], None] | None = None,
    ) -> None:
        if every < 1:
            raise DavaeError(f"a preview every {every} steps is not possible: give at least 1")
        if (height is None) != (width is None):
            raise DavaeError("give both height and width of the image, or neither")
        self.pipe, self.every, self.output_type, self.on_preview = pipe, every, output_type, on_preview
        self.size = None if height is None or width is None else (height, width)
        self.family = find_family(pipe)
        self.images: dict[int, Any] = {}
        self._last: Tensor | None = None  # latents after the previous step
        if getattr(pipe, "preview_decoder", None) is None:
            logger.info("no preview decoder was given: previews use the base VAE's decoder")

    def __call__(self, pipe: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """For ``callback_on_step_end``; changes nothing in the pipeline."""
        self.on_step(step, timestep, tensors["latents"])
        return {}

    @torch.no_grad()
    def on_step(self, step: int, timestep: Any, latents: Tensor) -> None:
        """For ``callback``; a new image begins at step 0.

        Raises:
            DavaeError: packed latents whose height and width are unknown, or latents in an unknown form.
        """
        if step == 0:
            self.images, self._last = {}, None
        if (step + 1) % self.every == 0:
            shown = self.decode(self._predicted(latents))
            self.images[step] = shown
            if self.on_preview is not None:
                self.on_preview(step, shown)
        self._last = latents

    def _predicted(self, latents: Tensor) -> Tensor:
        scheduler = self.pipe.scheduler
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            i = scheduler.step_index  # of the next step
            if self._last is None or i is None or self._last.shape != latents.shape:
                return latents
            before, now = scheduler.sigmas[i - 1].item(), scheduler.sigmas[i].item()
            if now == before:
                return latents
            velocity = (latents - self._last).float() / (now - before)
            return (latents.float() - now * velocity).to(latents.dtype)
        if str(scheduler.config.get("algorithm_type", "")).endswith("dpmsolver++"):
            predicted = scheduler.model_outputs[-1]
            if predicted is not None and predicted.shape == latents.shape:
                return predicted
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Any:
        """Images at base resolution from latents in the pipeline's form, packed or not; in ``output_type``."""
        vae = unwrapped(self.pipe.vae)
        if latents.ndim == 3 and self.family.packed:
            latents = unpack(latents, *self._grid(latents.shape[1]))
        elif latents.ndim == 5 and 1 in latents.shape[1:3]:  # one frame, before or after the channels
            latents = latents.squeeze(2 if latents.shape[2] == 1 else 1)
        elif latents.ndim == 4 and latents.shape[1] == 4 * vae.layout.channels:  # packed, still on a grid
            latents = torch.nn.functional.pixel_shuffle(latents, 2)
        if latents.ndim != 4 or latents.shape[1] != vae.layout.channels:
            raise DavaeError(
                f"latents of {type(self.pipe).__name__} have shape {tuple(latents.shape)}, and davae does not know how "
                "it packs them: previews are not possible with this pipeline"
            )
        base = latents[:, : vae.layout.base_channels]
        decoder = getattr(self.pipe, "preview_decoder", None)
        known = vae.base_vae if decoder is None else decoder
        # The pipeline's own VAE computes on the latents' device, even while its weights are offloaded.
        base = base.to(device=latents.device if decoder is None else decoder.device, dtype=known.dtype)
        raw = self.family.raw_base(vae.base_vae, base) if decoder is None else from_model_space(known, base)
        image = vae.decode_base(raw) if decoder is None else decode(decoder, raw)
        return VaeImageProcessor().postprocess(image, output_type=self.output_type)

    def _grid(self, tokens: int) -> tuple[int, int]:
        if self.size is not None:
            pixels = 2 * self.pipe.vae_scale_factor
            rows, columns = (side // pixels for side in self.size)
        else:
            rows = columns = math.isqrt(tokens)
        if rows * columns != tokens:
            raise DavaeError(
                f"{tokens} tokens do not make that image: give Previews the height and width that were given "
                "to the pipeline"
            )
        return 2 * rows, 2 * columns
