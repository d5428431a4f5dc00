"""Between an autoencoder's raw latents and what a diffusion model sees: ``(z - shift) * scale``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def latent_affine(config: Mapping[str, Any], channels: int) -> tuple[Tensor, Tensor]:
    """``shift`` and ``scale``, float32 ``[C]``, that an autoencoder's configuration states.

    ``scaling_factor`` and ``shift_factor`` hold for all channels; where there are ``latents_mean`` and ``latents_std``,
    they are the shift and one over the scale of each channel, times ``scaling_factor``.
    """
    scale = torch.full((channels,), _number(config, "scaling_factor", 1.0))
    shift = torch.full((channels,), _number(config, "shift_factor", 0.0))
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shift = torch.tensor(mean, dtype=torch.float32).flatten()
        scale = scale / torch.tensor(std, dtype=torch.float32).flatten()
    return shift, scale


def to_scaled(latent: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(z - shift) * scale`` of a raw latent ``[B, C, h, w]``; shift and scale ``[C]`` on any device."""
    return (latent - _of_channels(shift, latent)) * _of_channels(scale, latent)


def to_raw(latent: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``z / scale + shift``, the inverse of :func:`to_scaled`."""
    return latent / _of_channels(scale, latent) + _of_channels(shift, latent)


def _of_channels(values: Tensor, latent: Tensor) -> Tensor | float:
    """One number where all channels share it, which half precision does not round; else ``[C, 1, 1]``."""
    return float(values[0]) if (values == values[0]).all() else values.to(latent)[:, None, None]


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name)
    return default if value is None else float(value)
