"""The adversarial part of the autoencoder stages: the generator's term, and the discriminator as a player."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.latents import adaptive_weight
from davae.models import PatchDiscriminator, hinge_discriminator_loss, hinge_generator_loss
from davae.recipes.loop import OptimizerSettings
from davae.recipes.settings import GanSettings
from davae.training.stage import Player

MAX_ADAPTIVE_GAN = 1e4  # official code


class Adversary(nn.Module):
    """The GAN's part in a generator's loss, and the discriminator's own loss on what the generator made last."""

    def __init__(self, settings: GanSettings) -> None:
        super().__init__()
        self.settings = settings
        self.discriminator = PatchDiscriminator(filters=settings.filters, layers=settings.layers)
        self._pair: tuple[Tensor, Tensor] | None = None

    def generator_term(
        self,
        images: Tensor,
        made: Tensor,
        reconstruction: Tensor,
        last: Tensor,
        step: int,
    ) -> Tensor:
        """``weight * ratio * hinge`` for the generator; zero before ``start_step``.

        Args:
            images, made: ``[B, 3, H, W]``.
            reconstruction: scalar reconstruction loss, the reference of the adaptive ratio.
            last: weight of the decoder's last layer.
            step: the loop's step.
        """
        loss = self.hinge(images, made, step)
        if loss is None:
            return reconstruction.new_zeros(())
        weight: Tensor | float = self.settings.weight
        if self.settings.adaptive and torch.is_grad_enabled():
            ratio = adaptive_weight(reconstruction, loss, last, maximum=MAX_ADAPTIVE_GAN)
            weight = weight * ratio
        return weight * loss

    def hinge(self, images: Tensor, made: Tensor, step: int) -> Tensor | None:
        """The generator's hinge loss without its weight; none before ``start_step``.

        What was made is kept for the discriminator's turn.
        """
        self._pair = (images.detach(), made.detach())
        if step < self.settings.start_step:
            return None
        self.discriminator.requires_grad_(False)
        loss = hinge_generator_loss(self.discriminator(made))
        self.discriminator.requires_grad_(True)
        return loss

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """The discriminator's hinge loss; zero before ``start_step``."""
        if self._pair is None:
            raise RuntimeError("the generator has not run yet")
        images, made = self._pair
        loss = hinge_discriminator_loss(self.discriminator(images), self.discriminator(made))
        return {"total": loss * (step >= self.settings.start_step)}


def make_adversary(
    settings: GanSettings, name: str = "discriminator"
) -> tuple[Adversary | None, list[Player]]:
    """The adversary and its player, called ``name``; none of either while the weight is 0."""
    if not settings.weight:
        return None, []
    adversary = Adversary(settings)
    optimizer = OptimizerSettings(learning_rate=settings.learning_rate, betas=settings.betas)
    return adversary, [Player(name, adversary, optimizer)]
