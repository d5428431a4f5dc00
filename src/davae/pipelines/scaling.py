"""Between an autoencoder's latents and what the transformer sees."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from torch import Tensor


def latent_scaling(vae: ModelMixin) -> tuple[float, float]:
    """``(scaling, shift)`` of an autoencoder: the transformer sees ``(latent - shift) * scaling``."""
    shift = getattr(vae.config, "shift_factor", None)
    return float(vae.config.scaling_factor), float(shift or 0.0)


def to_model_space(vae: ModelMixin, latent: Tensor) -> Tensor:
    """An autoencoder's latent [B, C, h, w] as the transformer sees it, ``(latent - shift) * scale``.

    Where the configuration has ``latents_mean`` and ``latents_std``, they are the shift and one over the scale of
    each channel, times ``scaling_factor``.
    """
    shift, scale = _per_channel(vae, latent)
    return (latent - shift) * scale


def from_model_space(vae: ModelMixin, latent: Tensor) -> Tensor:
    """The inverse of :func:`to_model_space`: what the autoencoder decodes."""
    shift, scale = _per_channel(vae, latent)
    return latent / scale + shift


def _per_channel(vae: ModelMixin, latent: Tensor) -> tuple[Tensor | float, Tensor | float]:
    scale, shift = latent_scaling(vae)
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return shift, scale
    mean, std = (torch.as_tensor(values).to(latent).view(-1, 1, 1) for values in (mean, std))  # [C, 1, 1]
    return mean, scale / std
