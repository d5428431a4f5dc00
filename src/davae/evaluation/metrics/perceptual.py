"""Perceptual distances of pairs of images, measured: LPIPS and the DINO distance, with what they were computed by."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation.dino_distance import DinoDistance
from davae.evaluation.metrics.fid import file_hash
from davae.training.perceptual import LpipsLoss


class Perceptual(Protocol):
    """A distance of pairs through a network."""

    def describe(self) -> dict[str, Any]:
        """Weights with their SHA-256, and the preprocessing."""

    def __call__(self, images: Tensor, reconstruction: Tensor, /) -> Tensor:
        """Distances ``[B]`` of images and reconstructions ``[B, 3, H, W]`` in [-1, 1]."""


class Lpips:
    """LPIPS of each pair, on the CPU.

    Args:
        weights: file of torchvision's VGG-16 weights.
        device: where it computes.

    Raises:
        DavaeError: the package or the file is missing, or the file holds other weights.
    """

    def __init__(self, weights: Path, device: str | torch.device = "cpu") -> None:
        if importlib.util.find_spec("lpips") is None:
            raise DavaeError("LPIPS needs the package lpips: pip install 'davae[lpips]'")
        if not weights.is_file():
            raise DavaeError(
                f"LPIPS needs torchvision's VGG-16 weights, and {weights} is no file: fetch "
                "https://download.pytorch.org/models/vgg16-397923af.pth where there is a network and give its path"
            )
        self._weights, self._device = weights, device
        self._network = LpipsLoss(str(weights)).to(device)

    def describe(self) -> dict[str, Any]:
        """See `Perceptual`."""
        return {
            "network": "LPIPS, VGG-16",
            "weights": self._weights.name,
            "weights_sha256": file_hash(self._weights),
            "resize": "none",
        }

    @torch.no_grad()
    def __call__(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """See `Perceptual`."""
        pairs = zip(images.to(self._device).split(1), reconstruction.to(self._device).split(1), strict=True)
        return torch.stack([self._network(a, b) for a, b in pairs]).cpu()  # the loss is a mean, so one by one


class Dino:
    """DINO distance of each pair, on the CPU.

    Args:
        folder: of a DINOv2 or DINOv3 network.
        device: where it computes.

    Raises:
        DavaeError: the folder holds no such network.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        self._device = device
        self._network = DinoDistance(folder).to(device)
        self.describe = self._network.describe

    @torch.no_grad()
    def __call__(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """See `Perceptual`."""
        return self._network(images.to(self._device), reconstruction.to(self._device)).cpu()
