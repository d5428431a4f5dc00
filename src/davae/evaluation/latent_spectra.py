"""Radial power spectra of the parts of a structured latent, and of what each of them adds to the image."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from davae.evaluation.spectrum import radial_power_spectrum
from davae.models import AutoencoderDA

Spectrum = tuple[list[float], list[float]]
"""Frequencies in cycles a sample, and powers."""


def detail_groups(vae: AutoencoderDA) -> dict[str, slice]:
    """Groups of the detail channels, as slices of ``z_d``.

    Of one level: group i is what Eq. 3 averages and ties to base channel i. Of nested levels: each level. Where the
    channels do not divide into groups, all of them.
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
    """Of ``z`` and of each detail group, from latents ``[N, C + D, h, w]``."""
    z, details = vae.layout.split(latents)
    groups = {name: details[:, channels] for name, channels in detail_groups(vae).items()}
    return {name: _spectrum(signal) for name, signal in ({"z": z} | groups).items()}


def image_spectra(
    vae: AutoencoderDA,
    latents: Tensor,
    images: Tensor,
    made: dict[str, Tensor],
    decode: Callable[[Tensor], Tensor],
) -> dict[str, Spectrum]:
    """Of the images, of their reconstructions, and of the bands that the details add.

    A group's band is the reconstruction minus the one made with this group zeroed. The bands do not sum to that of all
    details, for the decoder is not linear.

    Args:
        vae: whose latents they are.
        latents: ``[n, C + D, h, w]``; one decoding of all a group is made.
        images: ``[n, 3, H, W]`` that they stand for.
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
