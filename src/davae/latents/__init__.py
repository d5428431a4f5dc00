"""Tensor mathematics of structured latents: layout, alignment, prefixes of channels, KL term, statistics."""

from davae.choices import AlignmentForm
from davae.latents.alignment import (
    AlignmentLoss,
    adaptive_weight,
    gaussian_kl,
    gradient_ratio,
    gradient_scale,
    grouped_mean,
    self_similarity,
)
from davae.latents.layout import LatentLayout, token_count
from davae.latents.prefixes import ChannelPrefixes
from davae.latents.statistics import ChannelStatistics, latent_affine, to_raw, to_scaled

__all__ = [
    "AlignmentForm",
    "AlignmentLoss",
    "ChannelPrefixes",
    "ChannelStatistics",
    "LatentLayout",
    "adaptive_weight",
    "gaussian_kl",
    "gradient_ratio",
    "gradient_scale",
    "grouped_mean",
    "latent_affine",
    "self_similarity",
    "to_raw",
    "to_scaled",
    "token_count",
]
