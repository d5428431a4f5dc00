"""Between an autoencoder's latents and what the transformer sees."""

from __future__ import annotations

from diffusers import ModelMixin


def latent_scaling(vae: ModelMixin) -> tuple[float, float]:
    """``(scaling, shift)`` of an autoencoder: the transformer sees ``(latent - shift) * scaling``."""
    shift = getattr(vae.config, "shift_factor", None)
    return float(vae.config.scaling_factor), float(shift or 0.0)
