"""A step of the autoencoder stage as the official SD3 code trains it: its plain form, and davae's of the same losses.

The detail encoder is frozen, the frozen base's reconstruction of the full image is the target, the alignment's weight
is fixed, and there is no GAN. The code computes the target and the base latent anew in every step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from davae.data.images.protocol import DatasetWrapper, Item
from davae.models import AutoencoderDA
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
        warm_blocks=False,
    )


def official_reconstruction(lpips: str | None) -> ReconstructionSettings:
    """L1 (the code's 2.0 on [0, 1] is 1.0 on [-1, 1]), KL, and LPIPS of whole images if there is a backbone."""
    return ReconstructionSettings(
        l1_weight=1.0, lpips_weight=float(lpips is not None), lpips_backbone=lpips, kl_weight=1e-7, kl_reduction="sum"
    )


@torch.no_grad()
def frozen_reconstruction(vae: AutoencoderDA, images: Tensor) -> Tensor:
    """The base's reconstruction of full-resolution images ``[B, 3, H, W]``, clamped to [-1, 1]."""
    return native_reconstruction(vae, images).clamp(-1, 1)


class OfficialObjective(StructuredObjective):
    """The loss with a target by the frozen base, computed in the step unless the batch has it."""

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """As the base class's."""
        if "target" not in batch:
            batch = {**batch, "target": frozen_reconstruction(self.autoencoder, batch["image"])}
        return super().forward(batch, step)


class OfficialStage(AutoencoderStage):
    """The stage with the target of :class:`OfficialObjective`."""

    objective_class = OfficialObjective

    def __init__(self, autoencoder: AutoencoderDA, *args: Any, cache_latents: bool = False, **kwargs: Any) -> None:
        super().__init__(autoencoder, *args, cache_latents=cache_latents, **kwargs)
        if cache_latents:
            self.dataset = WithTargets(self.dataset, autoencoder)


class WithTargets(DatasetWrapper):
    """The items of a data set with the frozen base's reconstructions, computed once, as ``target``."""

    def __init__(self, source: Dataset[Item], vae: AutoencoderDA) -> None:
        super().__init__(source)
        images = (self.source.item(i, 0)["image"] for i in range(len(self.source)))
        self.targets = [frozen_reconstruction(vae, x[None].to(vae.device))[0].cpu() for x in images]

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index`` as it looks in ``epoch``."""
        return {**self.source.item(index, epoch), "target": self.targets[index]}
