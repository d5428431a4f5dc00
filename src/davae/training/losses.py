"""The reconstruction terms of the autoencoder stages."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.evaluation.dino_distance import DinoDistance
from davae.recipes.settings import ReconstructionSettings
from davae.training.perceptual import LpipsLoss


def laplacian_l1(error: Tensor, levels: int = 3) -> Tensor:
    """L1 of an error image on a Laplacian pyramid, mean over pixels and levels.

    Each level holds what is lost by halving the resolution once more, so that errors in thin lines count as
    much as errors in large areas (the Lap-1 distance of Ling and Okada, 2006, with equal level weights).

    Args:
        error: ``[B, 3, H, W]``, difference of two images.
        levels: band-pass levels before the remainder.
    """
    total = error.new_zeros(())
    for _ in range(levels):
        reduced = F.avg_pool2d(error, 2)  # [B, 3, H/2, W/2]
        restored = F.interpolate(reduced, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + (error - restored).abs().mean()
        error = reduced
    return (total + error.abs().mean()) / (levels + 1)


class ReconstructionLoss(nn.Module):
    """Weighted sum of L1, squared error, Laplacian-pyramid L1, LPIPS and DINO distance of images in [-1, 1]."""

    def __init__(self, settings: ReconstructionSettings) -> None:
        super().__init__()
        self.settings = settings
        self.lpips = LpipsLoss(settings.lpips_backbone) if settings.lpips_weight else None
        self.dino = _dino(settings.dino_backbone) if settings.dino_weight else None

    def forward(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Named terms of ``[B, 3, H, W]`` images and ``reconstruction``, their weighted sum."""
        error = (reconstruction - images).float()
        terms = {"l1": error.abs().mean()}
        total = self.settings.l1_weight * terms["l1"]
        if self.settings.mse_weight:
            terms["mse"] = error.square().mean()
            total = total + self.settings.mse_weight * terms["mse"]
        if self.settings.laplacian_weight:
            terms["laplacian"] = laplacian_l1(error)
            total = total + self.settings.laplacian_weight * terms["laplacian"]
        if self.lpips is not None:
            terms["lpips"] = self.lpips(images, reconstruction).mean()
            total = total + self.settings.lpips_weight * terms["lpips"]
        if self.dino is not None:
            terms["dino"] = self.dino(images, reconstruction).mean()
            total = total + self.settings.dino_weight * terms["dino"]
        return {**terms, "reconstruction": total}


def _dino(backbone: str | None) -> DinoDistance:
    try:
        return DinoDistance(backbone)
    except DavaeError as error:
        raise DavaeError(f"reconstruction.dino_backbone: {error}") from error
