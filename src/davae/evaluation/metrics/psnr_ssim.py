"""Reconstruction metrics, one value an image. Images are [B, C, H, W] in [-1, 1], so the data range is 2."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from davae.errors import DavaeError

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
        [B] in dB; infinite where two images are equal.

    Raises:
        DavaeError: the shapes differ.
    """
    a, b = _checked(a, b, "psnr")
    # Without dim, torchmetrics pools the error over the batch before the logarithm.
    return peak_signal_noise_ratio(a, b, data_range=DATA_RANGE, reduction="none", dim=(1, 2, 3))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of images (Wang et al. 2004, Gaussian window, sigma 1.5).

    Args:
        a: images [B, C, H, W] in [-1, 1], at least 11 pixels a side.
        b: images of the same shape.

    Returns:
        [B], 1 where two images are equal.

    Raises:
        DavaeError: the shapes differ or the images are smaller than the window.
    """
    a, b = _checked(a, b, "ssim")
    if min(a.shape[-2:]) < _SSIM_WINDOW:
        raise DavaeError(
            f"ssim needs images of at least {_SSIM_WINDOW} x {_SSIM_WINDOW} pixels, got {list(a.shape)}"
        )
    _, local = structural_similarity_index_measure(
        a, b, data_range=DATA_RANGE, sigma=1.5, reduction="none", return_full_image=True
    )
    # As the authors and scikit-image do, only windows that lie inside the image count. The mean that
    # torchmetrics takes includes mirrored borders, which moves the value by up to a few hundredths.
    border = _SSIM_WINDOW // 2
    return local[..., border:-border, border:-border].mean((1, 2, 3))
