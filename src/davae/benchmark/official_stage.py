"""A step of the autoencoder stage as the official SD3 code trains it: its plain form, and davae's of the same losses.

The detail encoder is frozen, the frozen base's reconstruction of the full image is the target, the alignment's weight
is fixed, and there is no GAN. The code computes the target and the base latent anew in every step.
"""

from typing import Any

import torch
from torch import Tensor

from davae.models.latent_space import native_reconstruction
from davae.recipes.settings import AlignmentSettings, AutoencoderModelSettings, ReconstructionSettings
from davae.training.autoencoder.objective import StructuredObjective
from davae.training.autoencoder.stage import AutoencoderStage

ALIGNMENT = AlignmentSettings(weight=0.2)


def official_model(scale: Any, detail_channels: int) -> AutoencoderModelSettings:
    """The model of the SD3 code: no antialias, clamped, no detail dropout, torch's start."""
    return AutoencoderModelSettings(
        scale=scale,
        detail_channels=detail_channels,
        antialias=False,
        clamp_base_image=True,
        detail_dropout=0.0,
        start="random",
    )


def official_reconstruction(lpips: str | None) -> ReconstructionSettings:
    """L1 (the code's 2.0 on [0, 1] is 1.0 on [-1, 1]), KL, and LPIPS of whole images if there is a backbone."""
    return ReconstructionSettings(
        l1_weight=1.0, lpips_weight=float(lpips is not None), lpips_backbone=lpips, kl_weight=1e-7, kl_reduction="sum"
    )


class OfficialObjective(StructuredObjective):
    """The same loss with the target made as the code makes it: under the step's autocast, of a batch at once."""

    @torch.no_grad()
    def _base_reconstruction(self, images: Tensor) -> Tensor:
        return native_reconstruction(self.autoencoder, images).clamp(-1.0, 1.0).to(images.dtype)


class OfficialStage(AutoencoderStage):
    """The stage with :class:`OfficialObjective`."""

    objective_class = OfficialObjective
