"""Metrics of pairs of images, one value per pair. Images are [B, C, H, W] in [-1, 1], so the data range is 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from davae.errors import DavaeError
from davae.evaluation.metrics.names import PSNR, SSIM
from davae.models.perceptual import DinoDistance, LpipsLoss

DATA_RANGE = 2.0
_SSIM_WINDOW = 11


def _checked(a: Tensor, b: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    if a.ndim != 4 or a.shape != b.shape:
        raise DavaeError(
            f"{metric} compares two batches [B, C, H, W] of one shape, "
            f"but got {list(a.shape)} and {list(b.shape)}; resize or crop one of them first"
        )
    return a.float(), b.float()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio ``10 log10(4 / mse)`` of each pair of images.

    Args:
        a: images [B, C, H, W] in [-1, 1].
        b: images of the same shape.

    Returns:
        [B] in dB; infinite for equal images.

    Raises:
        DavaeError: the shapes differ.
    """
    a, b = _checked(a, b, "psnr")
    # Without dim, torchmetrics pools the error over the batch before the logarithm.
    return peak_signal_noise_ratio(a, b, data_range=DATA_RANGE, reduction="none", dim=(1, 2, 3))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of images (Wang et al. 2004, Gaussian window, sigma 1.5).

    Args:
        a: images [B, C, H, W] in [-1, 1], at least 11 pixels per side.
        b: images of the same shape.

    Returns:
        [B], 1 for equal images.

    Raises:
        DavaeError: the shapes differ or the images are smaller than the window.
    """
    a, b = _checked(a, b, "ssim")
    if min(a.shape[-2:]) < _SSIM_WINDOW:
        raise DavaeError(f"ssim needs images of at least {_SSIM_WINDOW} x {_SSIM_WINDOW} pixels, got {list(a.shape)}")
    _, local = structural_similarity_index_measure(
        a, b, data_range=DATA_RANGE, sigma=1.5, reduction="none", return_full_image=True
    )
    # As the authors and scikit-image do, only windows that lie inside the image count. The mean that
    # torchmetrics takes includes mirrored borders, which moves the value by up to a few hundredths.
    border = _SSIM_WINDOW // 2
    return local[..., border:-border, border:-border].mean((1, 2, 3))


PairDistance = Callable[[Tensor, Tensor], Tensor]
"""Images and reconstructions ``[B, 3, H, W]`` in [-1, 1] to one value per pair, ``[B]``."""


def pair_metrics(
    images: Tensor, reconstruction: Tensor, perceptual: Mapping[str, PairDistance] | None = None
) -> dict[str, Tensor]:
    """All metrics of pairs by name, ``[B]`` each, as measured wherever images are reconstructed.

    Args:
        images: ``[B, 3, H, W]`` in [-1, 1].
        reconstruction: the same shape.
        perceptual: further distances by name, such as ``lpips``.
    """
    metrics: dict[str, PairDistance] = {PSNR: psnr, SSIM: ssim, **(perceptual or {})}
    return {name: metric(images, reconstruction) for name, metric in metrics.items()}


class PairMeans:
    """Means of :func:`pair_metrics` over pairs, added in batches.

    Args:
        perceptual: further distances by name.
    """

    def __init__(self, perceptual: Mapping[str, PairDistance] | None = None) -> None:
        self.count = 0
        self._perceptual = perceptual
        self._sums: dict[str, float] = {}

    def update(self, images: Tensor, reconstruction: Tensor) -> PairMeans:
        """Add pairs ``[B, 3, H, W]`` in [-1, 1]; returns itself."""
        images, reconstruction = images.float().cpu(), reconstruction.float().cpu()
        for name, values in pair_metrics(images, reconstruction, self._perceptual).items():
            self._sums[name] = self._sums.get(name, 0.0) + float(values.double().sum())
        self.count += len(images)
        return self

    def figures(self) -> dict[str, float]:
        """Mean by name; empty before the first pair."""
        return {name: total / self.count for name, total in self._sums.items()}


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
