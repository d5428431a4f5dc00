"""Radial power spectra: the distribution of the energy of images or latents over spatial frequency."""

from __future__ import annotations

import torch
from torch import Tensor

from davae.errors import DavaeError

NYQUIST = 0.5
"""Highest frequency along an axis, in cycles per pixel. Rings above it exist in the corners only."""


def radial_bins(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The ring each coefficient of ``torch.fft.fft2`` belongs to.

    Rings are one cycle per shorter side wide; ring 0 holds the mean alone.

    Returns:
        ring index [H, W] (int64) and the centre frequency of each ring [K] in cycles per pixel.
    """
    side = min(height, width)
    fy = torch.fft.fftfreq(height, dtype=torch.float64)
    fx = torch.fft.fftfreq(width, dtype=torch.float64)
    radius = torch.hypot(fy[:, None], fx[None, :])
    index = (radius * side).round().long()
    index[(index == 0) & (radius > 0)] = 1  # on a long side frequencies fall below half a ring
    return index, torch.arange(int(index.max()) + 1, dtype=torch.float64) / side


def radial_power_spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean power on rings of equal frequency, averaged over batch and channels.

    The Fourier transform is orthonormal, so white noise of variance v has the flat spectrum v, and the sum
    of power times ring size over H W is the mean square of ``x`` (Parseval).

    Args:
        x: images or latents [B, C, H, W].

    Returns:
        frequency [K] in cycles per pixel (or latent cell) from 0 to the corner's 0.71, and power [K], float64.
    """
    if x.ndim != 4 or x.shape[0] == 0:
        raise DavaeError(f"a spectrum needs a batch [B, C, H, W] that is not empty, got {list(x.shape)}")
    height, width = x.shape[-2:]
    power = torch.zeros(height, width, dtype=torch.float64, device=x.device)
    for part in x.split(64):
        power += torch.fft.fft2(part.double(), norm="ortho").abs().square().sum((0, 1))
    power = (power / (x.shape[0] * x.shape[1])).cpu().flatten()
    index, frequency = radial_bins(height, width)
    index = index.flatten()
    count = torch.bincount(index, minlength=len(frequency))
    total = torch.zeros(len(frequency), dtype=torch.float64).index_add_(0, index, power)
    return frequency, total / count.clamp_min(1)


def log_spectral_distance(a: Tensor, b: Tensor) -> float:
    """Root mean square difference of two radial spectra in dB, over the rings from the first to Nyquist.

    Args:
        a: images [N, C, H, W].
        b: images [M, C, H, W] of the same height and width.

    Returns:
        dB; 0 for equal spectra, 3.01 if one has twice the power of the other at all frequencies.
    """
    if a.shape[-2:] != b.shape[-2:]:
        raise DavaeError(f"spectra of different sizes cannot be compared: {list(a.shape)}, {list(b.shape)}")
    frequency, power_a = radial_power_spectrum(a)
    return spectra_distance(frequency, power_a, radial_power_spectrum(b)[1])


def spectra_distance(frequency: Tensor, power_a: Tensor, power_b: Tensor) -> float:
    """:func:`log_spectral_distance` from two spectra ``[K]`` that :func:`radial_power_spectrum` made."""
    ring = (frequency > 0) & (frequency <= NYQUIST)
    return float(_decibels(power_a[ring], power_b[ring]).square().mean().sqrt())


def spectral_gains(frequency: Tensor, power_a: Tensor, power_b: Tensor) -> list[float]:
    """Mean ``10 log10(a / b)`` over the rings of each octave, in dB, the octave below Nyquist first; ``[K]`` spectra.

    Below 0 where ``a`` lacks power, such as the fine structure that an enlarged image does not have.
    """
    gains, high = [], NYQUIST
    while (ring := (frequency > high / 2) & (frequency <= high)).any():
        gains.append(float(_decibels(power_a[ring], power_b[ring]).mean()))
        high /= 2
    return gains


def _decibels(power_a: Tensor, power_b: Tensor) -> Tensor:
    floor = 1e-20  # a constant image has no power outside ring 0
    return 10 * torch.log10(power_a.clamp_min(floor) / power_b.clamp_min(floor))


class SpectrumMean:
    """Radial power spectrum of a set of images of one size, added in batches."""

    def __init__(self) -> None:
        self.count = 0
        self._size: torch.Size | None = None
        self._total = torch.zeros(())
        self._frequency = torch.zeros(())

    def update(self, images: Tensor) -> SpectrumMean:
        """Add images ``[B, C, H, W]``; returns itself."""
        frequency, power = radial_power_spectrum(images)
        if self._size is not None and images.shape[-2:] != self._size:
            raise DavaeError(f"a spectrum needs one size: {list(images.shape[-2:])} after {list(self._size)}")
        self._size, self._frequency = images.shape[-2:], frequency
        self._total = self._total + power * len(images)
        self.count += len(images)
        return self

    def distance(self, other: SpectrumMean) -> float:
        """:func:`log_spectral_distance` of the two sets, in dB."""
        return spectra_distance(*self._beside(other))

    def gains(self, other: SpectrumMean) -> list[float]:
        """:func:`spectral_gains` of this set over the other, in dB."""
        return spectral_gains(*self._beside(other))

    def _beside(self, other: SpectrumMean) -> tuple[Tensor, Tensor, Tensor]:
        if self.count == 0 or self._size != other._size:
            raise DavaeError(f"spectra of different sizes cannot be compared: {self._size}, {other._size}")
        return self._frequency, self._total / self.count, other._total / other.count
