"""Losses of the autoencoder stages: reconstruction, and the GAN loss with its discriminator."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.data.cache import weights_hash
from davae.errors import named
from davae.latents import adaptive_weight
from davae.models import PatchDiscriminator, hinge_discriminator_loss, hinge_generator_loss
from davae.models.perceptual import DinoDistance, EfficientNetDistance, LpipsLoss
from davae.recipes.loop import OptimizerSettings
from davae.recipes.settings import GanSettings, ImageTerms, ReconstructionSettings
from davae.training.stage import TrainedModule


def laplacian_l1(error: Tensor, levels: int = 3) -> Tensor:
    """L1 norm of an error image on a Laplacian pyramid, mean over pixels and levels, a scalar.

    Each level holds what halving the resolution once more removes, so that errors in thin lines count as much as
    errors in large areas (the Lap-1 distance of Ling and Okada, 2006, with equal level weights).

    Args:
        error: ``[B, 3, H, W]``, difference of two images.
        levels: band-pass levels before the low-pass remainder.
    """
    total = error.new_zeros(())
    for _ in range(levels):
        reduced = F.avg_pool2d(error, 2)  # [B, 3, H/2, W/2]
        restored = F.interpolate(reduced, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + (error - restored).abs().mean()
        error = reduced
    return (total + error.abs().mean()) / (levels + 1)


_NETWORKS = {"lpips": "LPIPS", "dino": "DINO", "efficientnet": "EfficientNet"}


def _weights(terms: ImageTerms) -> dict[str, float]:
    """The weights above 0, by the name of their term."""
    found = {
        "l1": terms.l1_weight,
        "mse": terms.mse_weight,
        "laplacian": terms.laplacian_weight,
        "lpips": terms.lpips_weight,
        "dino": terms.dino_weight,
        "efficientnet": terms.efficientnet_weight,
    }
    return {name: weight for name, weight in found.items() if weight}


class ReconstructionLoss(nn.Module):
    """Weighted sum of L1, squared error, Laplacian-pyramid L1 and networks' distances of images in [-1, 1].

    Args:
        settings: the weights, and the networks' files.
        alone: weights for the samples without details; None takes the same.
    """

    def __init__(self, settings: ReconstructionSettings, alone: ImageTerms | None = None) -> None:
        super().__init__()
        self.settings, self.alone = settings, alone
        self.names = list(dict.fromkeys(["l1", *_weights(settings), *_weights(alone or settings), "reconstruction"]))
        self.networks = nn.ModuleDict()
        if "lpips" in self.names:
            self.networks["lpips"] = LpipsLoss(settings.lpips_backbone)
        if "dino" in self.names:
            self.networks["dino"] = _dino(settings.dino_backbone)
        if "efficientnet" in self.names:
            self.networks["efficientnet"] = EfficientNetDistance()

    def foundations(self) -> dict[str, str]:
        """Hashes of the networks in use, by a readable name."""
        return {f"the {_NETWORKS[name]} network": weights_hash(network) for name, network in self.networks.items()}

    def forward(self, images: Tensor, reconstruction: Tensor, without: Tensor | None = None) -> dict[str, Tensor]:
        """Unweighted scalar terms of two ``[B, 3, H, W]`` batches, and their weighted sum as ``reconstruction``.

        Args:
            images, reconstruction: to be compared.
            without: ``[B]``, which samples were decoded without details. All are means over the batch, in which a
                sample without a term counts as 0.
        """
        if self.alone is None or without is None:
            return self._terms(images, reconstruction, self.settings)
        sums = {name: reconstruction.new_zeros((), dtype=torch.float32) for name in self.names}
        for part, chosen in ((self.settings, ~without), (self.alone, without)):
            share = float(chosen.sum()) / len(chosen)
            if share:
                for name, value in self._terms(images[chosen], reconstruction[chosen], part).items():
                    sums[name] = sums[name] + share * value
        return sums

    def _terms(self, images: Tensor, reconstruction: Tensor, settings: ImageTerms) -> dict[str, Tensor]:
        error, weights = (reconstruction - images).float(), _weights(settings)
        terms = {"l1": error.abs().mean()}
        total = settings.l1_weight * terms["l1"]
        for name in [name for name in weights if name != "l1"]:
            if name == "mse":
                terms[name] = error.square().mean()
            elif name == "laplacian":
                terms[name] = laplacian_l1(error)
            else:
                terms[name] = self.networks[name](images, reconstruction).mean()
            total = total + weights[name] * terms[name]
        return {**terms, "reconstruction": total}


def _dino(backbone: str | None) -> DinoDistance:
    with named("reconstruction.dino_backbone"):
        return DinoDistance(backbone)


MAX_ADAPTIVE_GAN = 1e4  # official code


class GanLoss(nn.Module):
    """The adversarial term of the generator, and the discriminator's loss on the generator's latest batch."""

    def __init__(self, settings: GanSettings) -> None:
        super().__init__()
        self.settings = settings
        self.discriminator = PatchDiscriminator(filters=settings.filters, layers=settings.layers)
        self._pair: tuple[Tensor, Tensor] | None = None

    def generator_term(self, images: Tensor, made: Tensor, reconstruction: Tensor, last: Tensor, step: int) -> Tensor:
        """``weight * ratio * hinge`` for the generator, a scalar; zero before ``start_step``.

        Args:
            images, made: ``[B, 3, H, W]`` in [-1, 1].
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
        """The generator's unweighted hinge loss, a scalar; ``None`` before ``start_step``.

        Both batches are kept, detached, for the discriminator's loss.
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


def make_gan_loss(settings: GanSettings, name: str = "discriminator") -> tuple[GanLoss | None, list[TrainedModule]]:
    """The GAN loss, also as a trained module called ``name``; ``None`` and no module if its weight is 0."""
    if not settings.weight:
        return None, []
    gan_loss = GanLoss(settings)
    optimizer = OptimizerSettings(learning_rate=settings.learning_rate, betas=settings.betas)
    return gan_loss, [TrainedModule(name, gan_loss, optimizer)]
