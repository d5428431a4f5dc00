"""LPIPS and the DINO distance as metrics: of each pair, with what they were computed by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from davae.evaluation.dino_distance import DinoDistance
from davae.training.perceptual import LpipsLoss


class Perceptual:
    """A distance of pairs through a network, without gradients.

    Args:
        network: gives distances ``[B]``.
        device: where it computes.
    """

    def __init__(self, network: LpipsLoss | DinoDistance, device: str | torch.device = "cpu") -> None:
        self._network, self._device = network.to(device), device

    def describe(self) -> dict[str, Any]:
        """Weights with their SHA-256, and the preprocessing."""
        return self._network.describe()

    @torch.no_grad()
    def __call__(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Distances ``[B]``, on the CPU, of images and reconstructions ``[B, 3, H, W]`` in [-1, 1]."""
        # One by one: of large images a batch would fill the memory.
        pairs = zip(images.split(1), reconstruction.split(1), strict=True)
        return torch.cat([self._network(a.to(self._device), b.to(self._device)).cpu() for a, b in pairs])
