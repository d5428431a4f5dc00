"""Radial power spectra of the parts of a structured latent, and of their contributions to the image."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from davae.errors import DavaeError
from davae.evaluation.metrics.spectrum import NYQUIST, radial_bins, radial_power_spectrum
from davae.models import AutoencoderDA

Spectrum = tuple[list[float], list[float]]
"""Frequencies in cycles per sample, and powers."""


def detail_groups(vae: AutoencoderDA) -> dict[str, slice]:
    """Groups of the detail channels, as slices of ``z_d``.

    With one level, group i is what Eq. 3 averages and aligns with base channel i; with nested levels, each level is a
    group. If the channels do not divide into groups, there is one group of all.
    """
    base = vae.layout.base_channels
    if len(vae.levels) > 2:  # the base is the lowest
        ends = [level.layout.channels - base for level in vae.levels]
        return {f"details of level {i}": slice(*ends) for i, ends in enumerate(pairwise(ends), 1)}
    if vae.layout.detail_channels % base:
        return {"details": slice(0, vae.layout.detail_channels)}
    size = vae.layout.group_size
    return {f"details {i + 1}": slice(i * size, (i + 1) * size) for i in range(base)}


def latent_spectra(vae: AutoencoderDA, latents: Tensor) -> dict[str, Spectrum]:
    """Spectra of ``z`` and of each detail group, from latents ``[N, C + D, h, w]``."""
    z, details = vae.layout.split(latents)
    groups = {name: details[:, channels] for name, channels in detail_groups(vae).items()}
    return {name: _spectrum(signal) for name, signal in ({"z": z} | groups).items()}


def image_spectra(
    vae: AutoencoderDA, latents: Tensor, images: Tensor, made: dict[str, Tensor], decode: Callable[[Tensor], Tensor]
) -> dict[str, Spectrum]:
    """Spectra of the images, of their reconstructions, and of the bands that the details add.

    A group's band is the reconstruction minus the one with this group zeroed. The bands do not sum to that of all
    details, since the decoder is not linear.

    Args:
        vae: of the latents.
        latents: ``[n, C + D, h, w]``; decoded once per group.
        images: ``[n, 3, H, W]``, which they encode.
        made: the reconstructions ``whole``, and ``zeroed`` without any details.
        decode: latents to images.
    """
    signals = {"images": images, "reconstruction": made["whole"], "without details": made["zeroed"]}
    signals["added by all details"] = made["whole"] - made["zeroed"]
    z, details = vae.layout.split(latents)
    for name, channels in detail_groups(vae).items():
        lacking = details.clone()
        lacking[:, channels] = 0
        signals[f"added by {name}"] = made["whole"] - decode(vae.layout.join(z, lacking))
    return {name: _spectrum(signal) for name, signal in signals.items()}


def _spectrum(signal: Tensor) -> Spectrum:
    frequency, power = radial_power_spectrum(signal)
    return frequency.tolist(), power.tolist()


def high_frequency_share(x: Tensor) -> float:
    """Share of a signal's variance in the upper half of its frequencies, without the means.

    Latents with a higher share than images are harder to learn for a diffusion model, which works from coarse
    to fine (Skorokhodov et al. 2025, "Improving the Diffusability of Autoencoders", arXiv 2502.14831; there with
    a cosine transform in blocks, here with the Fourier transform of the whole).

    Args:
        x: images or latents ``[B, C, H, W]``; channels are brought to unit variance first, so that none
            outweighs the others.

    Returns:
        In [0, 1]; white noise has nearly 0.8, since most frequencies of a square grid are high.
    """
    if x.ndim != 4 or min(x.shape[-2:]) < 4:
        raise DavaeError(f"at least 4 x 4 positions [B, C, H, W] are needed, got {list(x.shape)}")
    x = x.double() - x.double().mean(dim=(-2, -1), keepdim=True)
    x = x / x.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-12)
    height, width = x.shape[-2:]
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean(dim=(0, 1)).cpu()
    index, frequency = radial_bins(height, width)
    high = frequency[index] > NYQUIST / 2
    return float(power[high].sum() / power.sum().clamp_min(1e-300))


def local_distant_similarity(latents: Tensor, *, near: int = 1) -> float:
    """Difference of the cosine similarity of neighbouring positions and that of distant ones.

    A strong spatial structure, not the separation of classes, was found to predict how much a representation
    helps a generator (Singh et al. 2025, "What matters for Representation Alignment: Global Information or Spatial
    Structure?", arXiv 2512.10794).

    Args:
        latents: ``[B, C, h, w]``; channels are standardised over the batch first.
        near: positions at most this far on both axes are near; those at least half the grid away are distant.

    Returns:
        Mean cosine of near pairs minus mean cosine of distant pairs; 0 for noise.
    """
    if latents.ndim != 4 or min(latents.shape[-2:]) < 4:
        raise DavaeError(f"at least 4 x 4 positions [B, C, h, w] are needed, got {list(latents.shape)}")
    x = latents.double()
    x = (x - x.mean(dim=(0, 2, 3), keepdim=True)) / x.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-12)
    x = F.normalize(x, dim=1)
    height, width = x.shape[-2:]
    vectors = x.flatten(2).transpose(1, 2)  # [B, h w, C]
    cosine = (vectors @ vectors.transpose(1, 2)).mean(0).cpu()  # [h w, h w]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    distance = torch.maximum((rows[:, None] - rows[None, :]).abs(), (columns[:, None] - columns[None, :]).abs())
    close = (distance > 0) & (distance <= near)
    far = distance >= min(height, width) // 2
    return float(cosine[close].mean() - cosine[far].mean())
